//! Discard: guest RAM that the guest has given back leaves the host's memory.
//!
//! In: ranges of guest RAM whose contents are nobody's any more. Out: the same ranges, without memory of their own. Holds: a
//! snapshot's file is never touched, and what can't be dropped stays; only the saving is lost then.

use crate::ram::GuestRam;
use devices::virtio::{Discard, Segment};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Private memory is replaced in pieces of at least this size: each is a mapping of its own, and a process has only so many.
const REPLACED_MIN: usize = 2 << 20;

/// Drops ranges of a machine's RAM.
#[derive(Debug)]
pub struct RamDiscard {
    ram: GuestRam,
}

impl RamDiscard {
    /// For this RAM.
    pub fn new(ram: &GuestRam) -> Self {
        Self { ram: ram.clone() }
    }
}

impl Discard for RamDiscard {
    fn discard(&mut self, range: Segment) {
        let len = range.len as usize;
        let Some((region, start)) = self.ram.memory().to_region_addr(GuestAddress(range.address)) else {
            return;
        };
        let Ok(slice) = region.get_slice(start, len) else { return };
        let host = slice.ptr_guard_mut().as_ptr();
        match region.file_offset() {
            Some(_) if len >= REPLACED_MIN => {
                self.ram.note_dropped(range.address, range.len.into());
                replace(host, len);
            }
            _ => forget(host, len),
        }
        slice.bitmap().mark_dirty(0, len);
    }
}

/// Puts zero pages where a private mapping of the snapshot was. Without this the range would show the file's bytes again, and
/// the next snapshot would hold them.
fn replace(host: *mut u8, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range lies in a mapping of guest RAM, which lives as long as the machine and which nobody holds
    // references into; the guest sees zeroes from here on, which it has allowed.
    unsafe { libc::mmap(host.cast(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    // SAFETY: as above. It is as little a child's as the rest of RAM (`GuestRam::while_copied`).
    unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTFORK) };
}

/// Gives up the process's own pages. A fresh guest's read as zero then; of a snapshot's mapping the range shows the file's bytes again,
/// which cost nothing.
fn forget(host: *mut u8, len: usize) {
    // SAFETY: as above; the contents of the range are nobody's any more.
    unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{FileRange, of_file};
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    const RANGE: Segment = Segment { address: 2 << 20, len: 2 << 20 };

    #[test]
    fn a_fresh_guest_has_not_touched_what_it_gave_back() {
        let ram = GuestRam::new(8 << 20).unwrap();
        ram.memory().write_slice(b"gone", GuestAddress(3 << 20)).unwrap();
        ram.memory().write_slice(b"kept", GuestAddress(4 << 20)).unwrap();
        RamDiscard::new(&ram).discard(RANGE);
        let mut chunk = vec![1; 1 << 20];
        assert!(!ram.read_touched(3 << 20, &mut chunk).unwrap());
        assert!(ram.read_touched(4 << 20, &mut chunk).unwrap());
        assert_eq!(&chunk[..4], b"kept");
    }

    #[test]
    fn a_restored_guest_gives_back_the_files_bytes_too_and_the_file_stays() {
        let (file, ram) = of_file(7, 8 << 20);
        RamDiscard::new(&ram).discard(RANGE);
        let byte = |at: u64| ram.memory().read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([byte((2 << 20) - 1), byte(2 << 20), byte((4 << 20) - 1), byte(4 << 20)], [7, 0, 0, 7]);
        let mut on_disk = [0; 1];
        file.read_exact_at(&mut on_disk, 3 << 20).unwrap();
        assert_eq!(on_disk, [7]);
    }

    #[test]
    fn a_small_range_of_a_restored_guest_goes_back_to_the_file() {
        let (_, ram) = of_file(7, 4 << 20);
        ram.memory().write_obj(9u8, GuestAddress(4096)).unwrap();
        RamDiscard::new(&ram).discard(Segment { address: 4096, len: 4096 });
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(4096)).unwrap(), 7);
    }

    /// Else a child that gets no RAM would get that, and each page of it would be copied when the guest writes there.
    #[test]
    fn nor_does_a_child_get_what_was_given_back() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        let ram = GuestRam::from_snapshot(file, &[FileRange { gpa: 0, len: 8 << 20, offset: 0 }]).unwrap();
        RamDiscard::new(&ram).discard(RANGE);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let place = format!("{:08x}-", ram.host_address(RANGE.address, 1).unwrap());
        let mapping = maps.split_once(&format!("\n{place}")).expect("a mapping of its own").1;
        let flags = mapping.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.contains(" dc"), "{flags}");
    }
}
