//! File systems in files, by way of loop devices.
//!
//! In: files. Out: block devices, or directories. Holds: a file system that is no longer looked at is not mounted, and what is read
//! of it later is what its file holds by then.

use super::cut::PIECE;
use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes an ext4 of so many MiB, with a journal, to which nothing is written but what somebody asks for.
///
/// # Errors
/// The program is missing, or fails.
pub fn make_file_system(image: &Path, mib: u32) -> Result<()> {
    let mut mke2fs = Command::new("/tools/bin/mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-b", "4096", "-J", "size=4"]);
    mke2fs.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    run(mke2fs.arg(image).arg(format!("{mib}M"))).map(drop)
}

/// A file, and the block device that it is.
pub struct Device {
    file: File,
    node: PathBuf,
}

impl Device {
    /// Makes a device of a file; it is the first that is free, so nobody else may do the same meanwhile.
    ///
    /// # Errors
    /// The host won't.
    pub fn of(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).open(path)?;
        let node = PathBuf::from(run(Command::new("losetup").arg("-f"))?.trim());
        run(Command::new("losetup").args([&node, path]))?;
        Ok(Self { file, node })
    }

    /// Where it is.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Writes it from its beginning. Nobody has it open meanwhile, or they may read what was there before.
    ///
    /// # Errors
    /// There is no room.
    pub fn write(&self, pieces: &[&[u8]]) -> Result<()> {
        // In the lab this takes a third of the time of one long write, and a quarter of that of a new file each time.
        let mut pieces = (0..).step_by(PIECE).zip(pieces);
        pieces.try_for_each(|(at, piece)| self.file.write_all_at(piece, at)).context("cannot write a device")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // If it is in use, it goes when it no longer is.
        let _ = run(Command::new("losetup").arg("-d").arg(&self.node));
    }
}

/// Mounts an ext4, with these options, whose journal is replayed if need be; what is seen of it until it is unmounted.
///
/// # Errors
/// It is damaged, or still in use at the end; an error of `look`.
pub fn mounted<T>(
    device: &Path,
    place: &Path,
    options: &CStr,
    look: impl FnOnce() -> Result<T>,
) -> Result<T> {
    mount(device, place, "ext4", MountFlags::NOATIME, options)
        .with_context(|| format!("cannot mount {}", device.display()))?;
    let seen = look();
    let unmounted = unmount(place, UnmountFlags::empty());
    let seen = seen?;
    unmounted.with_context(|| format!("cannot unmount {}", device.display()))?;
    Ok(seen)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {complaint}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
