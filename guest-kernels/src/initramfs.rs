//! An initramfs, piece by piece.
//!
//! In: files, directories, symbolic links, device nodes, kernel modules. Out: a newc cpio archive, uncompressed because
//! unpacking costs a slow guest more than reading. Holds: the same pieces give the same bytes (sorted names, no times,
//! owner root), and each file's parents come before it.
//!
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use crate::cache;
use crate::modules::{self, Module};
use crate::stock::{self, StockKernel};
use anyhow::{Context, Result, ensure};
use cpio::newc;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
/// The type bits of a character device's mode, `S_IFCHR`.
pub const CHARACTER_DEVICE: u32 = 0o020_000;

/// The pieces of an initramfs; every path is relative to its root, with or without a leading slash.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Initramfs {
    /// An initramfs with the mount points and the two device nodes that the kernel and a shell need from the first.
    pub fn new() -> Initramfs {
        let mut initramfs = Initramfs::default();
        for dir in ["proc", "sys", "tmp", "root", "run", "etc"] {
            initramfs.dir(dir);
        }
        initramfs.device("dev/console", CHARACTER_DEVICE | 0o600, 5, 1);
        initramfs.device("dev/null", CHARACTER_DEVICE | 0o666, 1, 3);
        initramfs
    }

    /// Adds a directory and its parents.
    pub fn dir(&mut self, path: &str) -> &mut Initramfs {
        self.add(path, DIRECTORY | 0o755, Content::Bytes(Vec::new()))
    }

    /// Adds a file with these permission bits and this content, in place of one with that name.
    pub fn file(&mut self, path: &str, permissions: u32, content: impl Into<Vec<u8>>) -> &mut Initramfs {
        self.add(path, REGULAR | permissions & 0o7777, Content::Bytes(content.into()))
    }

    /// Adds a file of this machine with its content and permissions, read when the archive is written.
    ///
    /// # Errors
    /// `source` is missing or is no regular file.
    pub fn copy(&mut self, path: &str, source: &Path) -> Result<&mut Initramfs> {
        let about = fs::metadata(source)
            .with_context(|| format!("cannot put {} into an initramfs", source.display()))?;
        ensure!(about.is_file(), "cannot put {} into an initramfs: it is no regular file", source.display());
        let mode = REGULAR | about.permissions().mode() & 0o7777;
        Ok(self.add(path, mode, Content::File(source.to_owned())))
    }

    /// Adds all that is below a directory of this machine; symbolic links stay links, other kinds of file are errors.
    ///
    /// # Errors
    /// Something can't be read.
    pub fn tree(&mut self, path: &str, source: &Path) -> Result<&mut Initramfs> {
        self.dir(path);
        let listing = fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))?;
        for item in listing {
            let item = item?;
            let name = item.file_name();
            let inside =
                format!("{path}/{}", name.to_str().with_context(|| format!("{name:?} is not UTF-8"))?);
            let kind = item.file_type()?;
            if kind.is_dir() {
                self.tree(&inside, &item.path())?;
            } else if kind.is_symlink() {
                self.symlink(&inside, &fs::read_link(item.path())?.to_string_lossy());
            } else {
                self.copy(&inside, &item.path())?;
            }
        }
        Ok(self)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Initramfs {
        self.add(path, SYMLINK | 0o777, Content::Bytes(target.as_bytes().to_vec()))
    }

    /// Adds a device node; `mode` has the type bits too, [`CHARACTER_DEVICE`] for example.
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Initramfs {
        let name = self.make_way(path);
        self.entries
            .insert(name, Entry { mode, device: (major, minor), content: Content::Bytes(Vec::new()) });
        self
    }

    /// Adds Debian's static busybox as `/bin/busybox`, and a link in `/bin` for each of its applets.
    ///
    /// # Errors
    /// It can't be fetched, or doesn't run here.
    pub fn busybox(&mut self) -> Result<&mut Initramfs> {
        let busybox = stock::busybox()?;
        let listing = Command::new(&busybox).arg("--list").output();
        let listing = listing.with_context(|| format!("cannot run {}", busybox.display()))?.stdout;
        self.dir("sbin");
        self.copy("bin/busybox", &busybox)?;
        for applet in String::from_utf8_lossy(&listing).lines().filter(|applet| *applet != "busybox") {
            self.symlink(&format!("bin/{applet}"), "busybox");
        }
        Ok(self)
    }

    /// Adds kernel modules and all they need as `/lib/modules/<release>/<name>.ko`, unpacked, with a `modules.dep` so that
    /// busybox's `modprobe` knows their order. What the kernel has built in is left out. Calls for the same kernel add
    /// up only if a later one repeats the names of the earlier.
    ///
    /// # Errors
    /// The kernel has no such module.
    pub fn modules(&mut self, kernel: &StockKernel, names: &[&str]) -> Result<&mut Initramfs> {
        let order = modules::load_order(kernel, names)?;
        let dir = format!("lib/modules/{}", kernel.release);
        self.file(&format!("{dir}/modules.dep"), 0o644, modules_dep(&order));
        for module in order {
            self.file(&format!("{dir}/{}.ko", module.name), 0o644, module.bytes);
        }
        Ok(self)
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// A source file can't be read or has 4 GiB or more, or `out` fails.
    pub fn write_to(&self, out: &mut impl Write) -> Result<()> {
        for (index, (name, entry)) in self.entries.iter().enumerate() {
            // Inode numbers tell hard links apart, so each entry has its own; 0 is no inode.
            entry.write(name, index as u32 + 1, out).with_context(|| format!("initramfs entry {name}"))?;
        }
        newc::trailer(out).context("initramfs trailer")?;
        Ok(())
    }

    /// Writes the archive into the cache under its own digest and returns its path.
    ///
    /// # Errors
    /// As [`Initramfs::write_to`], or the cache can't be written.
    pub fn publish(&self) -> Result<PathBuf> {
        let mut archive = Vec::new();
        self.write_to(&mut archive)?;
        let digest = stock::hex(&Sha256::digest(&archive));
        let dir = cache::cache_dir()?.join(format!("initramfs-{}", &digest[..16]));
        cache::publish(&dir, |dir| {
            fs::write(dir.join("initrd"), &archive).with_context(|| format!("cannot write {}", dir.display()))
        })?;
        Ok(dir.join("initrd"))
    }

    fn add(&mut self, path: &str, mode: u32, content: Content) -> &mut Initramfs {
        let name = self.make_way(path);
        self.entries.insert(name, Entry { mode, device: (0, 0), content });
        self
    }

    /// The name in the archive; its parents are added if need be.
    fn make_way(&mut self, path: &str) -> String {
        let name = path.trim_matches('/').to_owned();
        if let Some((parent, _)) = name.rsplit_once('/')
            && !self.entries.contains_key(parent)
        {
            self.dir(parent);
        }
        name
    }
}

impl Entry {
    fn write(&self, name: &str, inode: u32, out: &mut impl Write) -> Result<()> {
        let (major, minor) = self.device;
        let header = newc::Builder::new(name).ino(inode).mode(self.mode).rdev_major(major).rdev_minor(minor);
        match &self.content {
            Content::Bytes(bytes) => copy(header, &mut &bytes[..], bytes.len() as u64, out),
            Content::File(path) => {
                let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                let len = file.metadata()?.len();
                copy(header, &mut file, len, out)
            }
        }
    }
}

fn copy(header: newc::Builder, from: &mut impl io::Read, len: u64, out: &mut impl Write) -> Result<()> {
    let mut writer = header.write(out, u32::try_from(len).context("4 GiB or more do not fit")?);
    let copied = io::copy(&mut io::Read::take(&mut *from, len), &mut writer)?;
    ensure!(copied == len, "the file became shorter while it was read");
    writer.finish()?;
    Ok(())
}

/// depmod's format: each module, a colon, and all that must be loaded before it, the nearest first.
fn modules_dep(order: &[Module]) -> String {
    let line = |module: &Module| {
        let needs = order.iter().rev().filter(|other| needs(order, module, &other.name));
        let needs: String = needs.map(|other| format!(" {}.ko", other.name)).collect();
        format!("{}.ko:{needs}\n", module.name)
    };
    order.iter().map(line).collect()
}

/// Whether `module` needs `name`, directly or not. Ends because a module's needs stand before it in `order`.
fn needs(order: &[Module], module: &Module, name: &str) -> bool {
    let before = order.iter().take_while(|other| other.name != module.name);
    let mut direct = before.filter(|other| module.depends.contains(&other.name));
    direct.any(|other| other.name == name || needs(order, other, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Read = (String, u32, (u32, u32), Vec<u8>);

    fn archive(initramfs: &Initramfs) -> Vec<u8> {
        let mut out = Vec::new();
        initramfs.write_to(&mut out).unwrap();
        out
    }

    /// A reader of its own, after buffer-format.rst: 110 bytes of ASCII header, name and data each padded to 4 bytes.
    fn read(archive: &[u8]) -> Vec<Read> {
        let (mut at, mut entries) = (0, Vec::new());
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |n: usize| {
                let digits = &archive[at + 6 + 8 * n..at + 14 + 8 * n];
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[at + 110..at + 109 + name_size].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            let bytes = archive[data..data + size].to_vec();
            assert_eq!(field(5), 0, "{name} has a time");
            entries.push((name, field(1), (field(9), field(10)), bytes));
            at = (data + size).next_multiple_of(4);
        }
    }

    #[test]
    fn what_goes_in_is_read_back() {
        let source = tempfile::NamedTempFile::new().unwrap();
        fs::write(source.path(), "from a file").unwrap();
        fs::set_permissions(source.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let mut initramfs = Initramfs::default();
        initramfs.file("/a/b/c", 0o640, "text").symlink("a/link", "b/c");
        initramfs.device("dev/null", CHARACTER_DEVICE | 0o666, 1, 3).copy("x", source.path()).unwrap();
        let node =
            |name: &str, mode, device, data: &str| (name.to_owned(), mode, device, data.as_bytes().to_vec());
        let expected = [
            node("a", 0o040_755, (0, 0), ""),
            node("a/b", 0o040_755, (0, 0), ""),
            node("a/b/c", 0o100_640, (0, 0), "text"),
            node("a/link", 0o120_777, (0, 0), "b/c"),
            node("dev", 0o040_755, (0, 0), ""),
            node("dev/null", 0o020_666, (1, 3), ""),
            node("x", 0o100_750, (0, 0), "from a file"),
        ];
        assert_eq!(read(&archive(&initramfs)), expected);
    }

    #[test]
    fn the_order_of_adding_does_not_show() {
        let mut one = Initramfs::new();
        one.file("a", 0o644, "1").file("b/c", 0o644, "2");
        let mut other = Initramfs::default();
        other.file("b/c", 0o644, "2").file("a", 0o644, "1");
        other.entries.extend(Initramfs::new().entries);
        assert_eq!(archive(&one), archive(&other));
    }

    #[test]
    fn a_directory_does_not_go_in_as_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = Initramfs::new().copy("x", dir.path()).unwrap_err().to_string();
        assert!(error.contains("it is no regular file"), "{error}");
    }

    #[test]
    fn modules_dep_names_all_needs_nearest_first() {
        let module = |name: &str, depends: &[&str]| Module {
            name: name.to_owned(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            bytes: Vec::new(),
        };
        let order =
            [module("irqbypass", &[]), module("kvm", &["irqbypass"]), module("kvm_amd", &["kvm", "ccp"])];
        let expected = "irqbypass.ko:\nkvm.ko: irqbypass.ko\nkvm_amd.ko: kvm.ko irqbypass.ko\n";
        assert_eq!(modules_dep(&order), expected);
    }
}
