//! The file system that goes from kernel to kernel.
//!
//! In: its device, or none. Out: `/persist` mounted, frozen or thawed. Holds: what is read from the disk is what the other kernel
//! left there, not what this one remembers.

use crate::place::{HOME, PERSIST};
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::syncfs;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// The serial number by which its disk is found.
const SERIAL: &str = "persist";
// ioctl_fs(4), and Linux `include/uapi/linux/fs.h`.
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
const BLKFLSBUF: libc::Ioctl = 0x1261;

/// Mounts `/persist`, from the disk with that serial number unless a device is named.
pub(crate) fn attach(device: Option<&Path>) -> Result<()> {
    if !is_mounted()? {
        let device = device.map_or_else(|| by_serial(SERIAL), |device| Ok(device.to_owned()))?;
        flush(&device)?;
        fs::create_dir_all(PERSIST)?;
        mount(&device, PERSIST, "ext4", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {} on {PERSIST}", device.display()))?;
    }
    fs::create_dir_all(HOME).with_context(|| format!("cannot make {HOME}"))?;
    Ok(())
}

fn is_mounted() -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(1) == Some(PERSIST)))
}

/// Who forgot to attach it is told so.
pub(crate) fn must_be_mounted() -> Result<()> {
    ensure!(is_mounted()?, "{PERSIST} is not mounted: `vmm-checkpoint attach` comes first");
    Ok(())
}

fn by_serial(serial: &str) -> Result<PathBuf> {
    for disk in fs::read_dir("/sys/block").context("cannot list the disks")? {
        let disk = disk?;
        let found = fs::read_to_string(disk.path().join("serial"));
        if found.is_ok_and(|found| found.trim() == serial) {
            return Ok(Path::new("/dev").join(disk.file_name()));
        }
    }
    bail!("no disk has the serial number `{serial}`: name one with --persist")
}

/// Forgets what was read of a disk before another kernel wrote it.
fn flush(device: &Path) -> Result<()> {
    let disk = File::open(device).with_context(|| format!("cannot open {}", device.display()))?;
    control(&disk, BLKFLSBUF).with_context(|| format!("cannot flush {}", device.display()))
}

/// Writes all of it to the disk; who writes to it from now on waits.
pub(crate) fn freeze() -> Result<()> {
    let root = open()?;
    syncfs(&root).with_context(|| format!("cannot sync {PERSIST}"))?;
    control(&root, FIFREEZE).with_context(|| format!("cannot freeze {PERSIST}"))
}

/// Does nothing if it is not frozen.
pub(crate) fn thaw() -> Result<()> {
    match control(&open()?, FITHAW) {
        Err(Errno::INVAL) => Ok(()),
        done => done.with_context(|| format!("cannot thaw {PERSIST}")),
    }
}

fn open() -> Result<File> {
    must_be_mounted()?;
    File::open(PERSIST).with_context(|| format!("cannot open {PERSIST}"))
}

fn control(file: &File, request: libc::Ioctl) -> rustix::io::Result<()> {
    // SAFETY: none of these requests reads or writes its argument.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, 0) };
    if done < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    } else {
        Ok(())
    }
}
