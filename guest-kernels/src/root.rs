//! A small Debian as a read-only disk, for guests whose processes are to be checkpointed.
//!
//! In: the packages below, from the archive. Out: an ext4 image in the cache, the same file for every kernel, so that what
//! processes have mapped is the same wherever they go on. Holds: nothing of the packages was run; documentation and
//! translations are left out; busybox stands in for what the packages lack.

use crate::packages::{Packages, run, unpack};
use crate::{cache, stock};
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `tar` is what CRIU keeps a tmpfs with.
const PACKAGES: [&str; 11] = [
    "base-files",
    "coreutils",
    "criu",
    "dash",
    "e2fsprogs",
    "gzip",
    "iproute2",
    "mount",
    "nftables",
    "sqlite3",
    "tar",
];
/// The next release, whose CRIU is 4.2: trixie's 4.1 restores onto 7.2 but cannot dump a socket there, where `SO_PASSCRED` is no
/// option of TCP any more.
const SUITE: &str = "forky";
/// Changes when something else than the packages does: what is made below.
const EDITION: u32 = 1;
/// What nobody reads in a guest.
const LEFT_OUT: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/zoneinfo",
    "usr/lib/x86_64-linux-gnu/perl-base",
];
/// Where other file systems are mounted.
const MOUNT_POINTS: [&str; 8] = ["dev", "proc", "sys", "run", "tmp", "mnt", "persist", "usr/lib/modules"];
/// Since Debian 13 each of these is one directory.
const MERGED: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")];

/// An image of a small Debian root, made unless the cache has it. `init.sh` makes a guest's root of it.
///
/// # Errors
/// The archive can't be reached, or the cache can't be written.
pub fn root_image() -> Result<PathBuf> {
    // Named after what it is made of, so that an older one in the cache isn't taken for this one.
    let recipe = format!("{SUITE} {EDITION} {}", PACKAGES.join(" "));
    let digest = stock::hex(&Sha256::digest(recipe));
    let dir = cache::cache_dir()?.join(format!("guest-root-{}", &digest[..16]));
    cache::publish(&dir, |dir| make(dir).context("cannot make the guests' root"))?;
    Ok(dir.join("root"))
}

fn make(dir: &Path) -> Result<()> {
    eprintln!("making a guest root from Debian's {SUITE}: {}", PACKAGES.join(", "));
    let tree = dir.join("tree");
    fs::create_dir(&tree)?;
    let unpacked = unpack(SUITE, &PACKAGES, &tree)?;
    // The archive moves on, and this is not pinned: who looks for a difference finds it here.
    fs::write(dir.join("packages"), unpacked.join("\n") + "\n")?;
    let criu = unpacked.iter().find(|name| name.starts_with("criu_"));
    eprintln!("it has {} and {} more packages", criu.map_or("no CRIU", |name| name), unpacked.len() - 1);
    arrange(&tree).with_context(|| format!("cannot arrange {}", tree.display()))?;
    image(&tree, &dir.join("root"))?;
    cache::remove(&tree)
}

/// Makes of unpacked packages what a kernel's first program expects.
fn arrange(tree: &Path) -> Result<()> {
    LEFT_OUT.iter().try_for_each(|path| cache::remove(&tree.join(path)))?;
    MOUNT_POINTS.iter().try_for_each(|path| cache::create_dir(&tree.join(path)))?;
    for (link, target) in MERGED {
        if fs::symlink_metadata(tree.join(link)).is_err() {
            symlink(target, tree.join(link))?;
        }
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n")?;
    busybox(&tree.join("usr/bin"), &tree.join("usr/sbin"))
}

/// Adds busybox, under the names of its applets that no package has.
fn busybox(bin: &Path, sbin: &Path) -> Result<()> {
    let busybox = stock::busybox()?;
    fs::copy(&busybox, bin.join("busybox")).context("cannot copy busybox")?;
    let listing = Command::new(&busybox).arg("--list").output().context("cannot run busybox")?;
    for applet in String::from_utf8_lossy(&listing.stdout).lines() {
        if [bin, sbin].iter().all(|dir| fs::symlink_metadata(dir.join(applet)).is_err()) {
            symlink("busybox", bin.join(applet))?;
        }
    }
    // Where the kernel looks for it; no package has one, and busybox reads what Initramfs::modules writes.
    symlink("../bin/busybox", sbin.join("modprobe")).context("cannot link modprobe")
}

/// Without a journal, which nobody would write; made by the mke2fs that is in it.
fn image(tree: &Path, image: &Path) -> Result<()> {
    let mut mke2fs = Packages::at(tree).command("usr/sbin/mke2fs")?;
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-m", "0", "-d"]);
    let kib = bytes(tree)? / 1024;
    run(mke2fs.arg(tree).arg(image).arg(format!("{}K", kib + kib / 8 + 8192)))?;
    Ok(())
}

/// What the files below a directory take, in blocks of 4 KiB.
fn bytes(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let about = entry.metadata()?;
        total += if about.is_dir() { bytes(&entry.path())? } else { about.len() };
        total = total.next_multiple_of(4096) + 4096;
    }
    Ok(total)
}
