//! VMCOREINFO: what a Linux kernel tells debuggers about itself, found in its RAM.
//!
//! In: a guest's RAM. Out: the text, and where it is. Holds: the text is true of the kernel whose RAM it is in: where it says that
//! the kernel's name is, there is that name. So a copy in some buffer, of another boot or another kernel, isn't taken for it.
//!
//! Linux keeps it for kdump in a page of its own, as lines from the first byte of the page on, `OSRELEASE=` first
//! (`kernel/vmcore_info.c`; `Documentation/admin-guide/kdump/vmcoreinfo.rst`).

use crate::config::Shape;
use crate::layout::{PAGE_SIZE, ram_ranges};
use crate::ram::GuestRam;
use snapshot::CHUNK_SIZE;
use std::cell::Cell;
use std::io;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const FIRST_LINE: &str = "OSRELEASE=";
/// Where x86-64 Linux maps itself when neither it nor its text is moved (`arch/x86/include/asm/page_64_types.h`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Where in `struct new_utsname` the release is, after two names of 65 bytes (`include/uapi/linux/utsname.h`).
const RELEASE_AT: u64 = 2 * 65;

/// Where a machine's VMCOREINFO was when somebody looked: it stays there until the guest boots another kernel.
#[derive(Debug, Default)]
pub struct Place(Cell<Option<u64>>);

impl Place {
    /// The VMCOREINFO of the kernel in this RAM, if it has any. The first look goes through all RAM that was ever touched.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn look(&self, ram: &GuestRam, shape: &Shape) -> io::Result<Option<Vec<u8>>> {
        // A kernel that says no version is none that has it.
        if shape.kernel.version.is_none() {
            return Ok(None);
        }
        if let Some(text) = self.look_again(ram)? {
            return Ok(Some(text));
        }
        let found = search(ram, shape.memory)?;
        self.0.set(found.as_ref().map(|(gpa, _)| *gpa));
        Ok(found.map(|(_, text)| text))
    }

    /// The same, if it still is where [`Place::look`] found it: for those who have no time.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn look_again(&self, ram: &GuestRam) -> io::Result<Option<Vec<u8>>> {
        self.0.get().map_or(Ok(None), |gpa| at(ram, gpa))
    }
}

/// The value in a line such as `NAME=value`.
pub fn value<'a>(text: &'a [u8], name: &str) -> Option<&'a str> {
    let lines = std::str::from_utf8(text).ok()?.lines();
    lines.filter_map(|line| line.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
}

fn search(ram: &GuestRam, memory: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut chunk = vec![0; CHUNK_SIZE as usize];
    for (start, len) in ram_ranges(memory) {
        for gpa in (start..start + len).step_by(CHUNK_SIZE as usize) {
            let chunk = &mut chunk[..(start + len - gpa).min(CHUNK_SIZE) as usize];
            if !ram.read_touched(gpa, chunk)? {
                continue;
            }
            let pages = (gpa..).step_by(PAGE_SIZE as usize).zip(chunk.chunks(PAGE_SIZE as usize));
            for (gpa, page) in pages.filter(|(_, page)| page.starts_with(FIRST_LINE.as_bytes())) {
                if let Some(text) = checked(ram, page)? {
                    return Ok(Some((gpa, text)));
                }
            }
        }
    }
    Ok(None)
}

fn at(ram: &GuestRam, gpa: u64) -> io::Result<Option<Vec<u8>>> {
    let mut page = vec![0; PAGE_SIZE as usize];
    ram.read_touched(gpa, &mut page)?;
    checked(ram, &page)
}

/// The text in this page, if it is the VMCOREINFO of the kernel in this RAM.
fn checked(ram: &GuestRam, page: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let text = &page[..page.iter().position(|byte| *byte == 0).unwrap_or(page.len())];
    let Some((gpa, release)) = name_place(text) else { return Ok(None) };
    let name = [release.as_bytes(), &[0]].concat();
    Ok((read(ram, gpa, name.len())?.as_ref() == Some(&name)).then(|| text.to_vec()))
}

/// Bytes at an address of the guest's choice; none if that isn't RAM.
fn read(ram: &GuestRam, gpa: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
    let start = gpa & !(PAGE_SIZE - 1);
    let skip = (gpa - start) as usize;
    let mut pages = vec![0; (skip + len).next_multiple_of(PAGE_SIZE as usize)];
    if !ram.memory().check_range(GuestAddress(start), pages.len()) {
        return Ok(None);
    }
    ram.read_touched(start, &mut pages)?;
    Ok(Some(pages[skip..skip + len].to_vec()))
}

/// Where this text says that the kernel's release is, and the release.
fn name_place(text: &[u8]) -> Option<(u64, &str)> {
    let release = value(text, "OSRELEASE").filter(|release| !release.is_empty())?;
    let names = u64::from_str_radix(value(text, "SYMBOL(init_uts_ns)")?, 16).ok()?;
    let offset: u64 = value(text, "OFFSET(uts_namespace.name)")?.parse().ok()?;
    let moved: i64 = value(text, "NUMBER(phys_base)")?.parse().ok()?;
    let gpa = names.wrapping_sub(KERNEL_MAP).wrapping_add_signed(moved);
    Some((gpa.wrapping_add(offset).wrapping_add(RELEASE_AT), release))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::KernelIdentity;
    use vm_memory::Bytes;

    const RAM: u64 = 16 << 20;
    const RELEASE: &str = "6.12.107+deb13-cloud-amd64";

    /// The text of a kernel that lies `moved` bytes from where it was linked, and has its names 1 MiB after its start.
    fn text(moved: i64) -> String {
        let names = "SYMBOL(init_uts_ns)=ffffffff80100000\nOFFSET(uts_namespace.name)=4";
        format!("OSRELEASE={RELEASE}\nBUILD-ID=e1b6c81f\n{names}\nNUMBER(phys_base)={moved}\n")
    }

    fn ram_with(parts: &[(u64, &str)]) -> GuestRam {
        let ram = GuestRam::new(RAM).unwrap();
        for (gpa, text) in parts {
            ram.memory().write_slice(text.as_bytes(), GuestAddress(*gpa)).unwrap();
        }
        ram
    }

    fn shape(version: Option<&str>) -> Shape {
        let kernel = KernelIdentity { version: version.map(str::to_owned), build_id: None };
        Shape { name: "vm".to_owned(), vcpus: 1, memory: RAM, kernel }
    }

    fn look(ram: &GuestRam) -> Option<Vec<u8>> {
        Place::default().look(ram, &shape(Some(RELEASE))).unwrap()
    }

    #[test]
    fn it_is_found_where_it_is_true() {
        let name = 0x30_0000 + 4 + RELEASE_AT;
        let ram = ram_with(&[(name, RELEASE), (0x5000, &text(0)), (0x70_1000, &text(0x20_0000))]);
        let found = look(&ram).unwrap();
        assert_eq!(found, text(0x20_0000).into_bytes(), "a copy of another boot lies before it");
        assert_eq!(Place::default().look(&ram, &shape(None)).unwrap(), None, "not Linux");
        assert_eq!(value(&found, "BUILD-ID"), Some("e1b6c81f"));
    }

    #[test]
    fn what_is_not_the_kernels_own_is_not_found() {
        let name = (0x10_0000 + 4 + RELEASE_AT, RELEASE);
        assert_eq!(look(&ram_with(&[(0x5000, &text(0))])), None, "no such kernel");
        assert_eq!(look(&ram_with(&[name, (0x5010, &text(0))])), None, "not at the start of a page");
        assert_eq!(look(&ram_with(&[name, (0x5000, "OSRELEASE=\n")])), None);
        assert_eq!(look(&ram_with(&[name, (0x5000, &text(i64::MIN))])), None);
        assert_eq!(look(&ram_with(&[name, (0x5000, &text(RAM as i64))])), None, "outside RAM");
        assert_eq!(look(&ram_with(&[(name.0, "6.12.107+deb13-cloud-amd64x"), (0x5000, &text(0))])), None);
    }

    #[test]
    fn another_kernel_in_the_same_ram_is_looked_for_anew() {
        let name = 0x10_0000 + 4 + RELEASE_AT;
        let ram = ram_with(&[(name, RELEASE), (0x5000, &text(0))]);
        let place = Place::default();
        assert!(place.look(&ram, &shape(Some(RELEASE))).unwrap().is_some());
        ram.memory().write_slice(b"other", GuestAddress(0x5000)).unwrap();
        ram.memory().write_slice(text(0).as_bytes(), GuestAddress(0x9000)).unwrap();
        assert_eq!(place.look(&ram, &shape(Some(RELEASE))).unwrap(), Some(text(0).into_bytes()));
    }
}
