//! An initramfs, piece by piece.
//!
//! In: files, directories, symbolic links, device nodes, kernel modules. Out: a newc cpio archive, uncompressed because
//! unpacking costs a slow guest more than reading. Holds: the same pieces give the same bytes (sorted names, no times,
//! owner root), each file's parents come before it, and in the cache it is padded to whole pages.
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
use std::time::Duration;

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
/// The type bits of a character device's mode, `S_IFCHR`.
pub const CHARACTER_DEVICE: u32 = 0o020_000;

/// What the names of archives in the cache begin with.
const PREFIX: &str = "initramfs-";
/// QEMU's `microvm` puts the end of an initrd into the last page of RAM, where its ACPI tables are at the end too: if the two
/// meet, Linux finds no tables, or goes by damaged ones and hangs. An initrd of whole pages ends below that page.
const PAGE: usize = 4096;
/// After this time an archive that nobody asks for is removed: each change of a program that is in one makes others.
const UNUSED: Duration = Duration::from_secs(30 * 86_400);

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

    /// Adds kernel modules and all they need as `/lib/modules/<release>/<name>.ko`, unpacked, with a `modules.dep` and a
    /// `modules.alias` so that busybox's `modprobe` knows their order and what they are for; it is at `/sbin/modprobe` too,
    /// where the kernel looks for it. What the kernel has built in is left out. Calls for the same kernel add up only if a
    /// later one repeats the names of the earlier.
    ///
    /// # Errors
    /// The kernel has no such module.
    pub fn modules(&mut self, kernel: &StockKernel, names: &[&str]) -> Result<&mut Initramfs> {
        let order = modules::load_order(kernel, names)?;
        let dir = format!("lib/modules/{}", kernel.release);
        self.file(&format!("{dir}/modules.dep"), 0o644, modules_dep(&order));
        self.file(&format!("{dir}/modules.alias"), 0o644, modules_alias(&order));
        self.symlink("sbin/modprobe", "../bin/busybox");
        for module in order {
            self.file(&format!("{dir}/{}.ko", module.name), 0o644, module.bytes);
        }
        Ok(self)
    }

    /// Makes Debian's dynamically linked programs runnable once a disk with them is mounted: `/tools` has to lead to a
    /// directory with `bin`, `lib` (the shared libraries) and `lib64` (the dynamic loader). They take no space here.
    pub fn debian_tools(&mut self) -> &mut Initramfs {
        self.symlink("lib64", "tools/lib64").symlink("lib/x86_64-linux-gnu", "/tools/lib");
        // tcpdump looks for a user of its name to become; there is nobody but root here.
        self.file("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\ntcpdump:x:0:0::/:/bin/false\n");
        self.file("etc/group", 0o644, "root:x:0:\n")
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

    /// Writes the archive into the cache under its own digest and returns its path. Others that nobody has asked for in 30 days go.
    ///
    /// # Errors
    /// As [`Initramfs::write_to`], or the cache can't be written.
    pub fn publish(&self) -> Result<PathBuf> {
        let archive = self.pages()?;
        let digest = stock::hex(&Sha256::digest(&archive));
        let dir = cache::cache_dir()?.join(format!("{PREFIX}{}", &digest[..16]));
        cache::touch(&dir);
        cache::publish(&dir, |dir| {
            fs::write(dir.join("initrd"), &archive).with_context(|| format!("cannot write {}", dir.display()))
        })?;
        cache::prune(&dir, PREFIX, UNUSED)?;
        Ok(dir.join("initrd"))
    }

    /// The archive, padded.
    fn pages(&self) -> Result<Vec<u8>> {
        let mut archive = Vec::new();
        self.write_to(&mut archive)?;
        archive.resize(archive.len().next_multiple_of(PAGE), 0);
        Ok(archive)
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

/// depmod's format: `alias`, a pattern, a module.
fn modules_alias(order: &[Module]) -> String {
    let lines = |module: &Module| {
        let lines = module.aliases.iter().map(|alias| format!("alias {alias} {}\n", module.name));
        lines.collect::<String>()
    };
    order.iter().map(lines).collect()
}

/// Whether `module` needs `name`, directly or not. Ends because a module's needs stand before it in `order`.
fn needs(order: &[Module], module: &Module, name: &str) -> bool {
    let before = order.iter().take_while(|other| other.name != module.name);
    let mut direct = before.filter(|other| module.depends.contains(&other.name));
    direct.any(|other| other.name == name || needs(order, other, name))
}

#[cfg(test)]
mod tests;
