//! File systems in files, by way of loop devices.
//!
//! In: files. Out: block devices, or directories. Holds: what is attached or mounted is let go of when it is dropped.

use anyhow::{Context, Result, ensure};
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

/// Makes a block device of a file; it is the first that is free, so nobody else may do the same meanwhile.
///
/// # Errors
/// The host won't.
pub fn attach(image: &Path) -> Result<PathBuf> {
    let device = PathBuf::from(run(Command::new("losetup").arg("-f"))?.trim());
    run(Command::new("losetup").args([&device, image]))?;
    Ok(device)
}

/// The block device is none any more.
///
/// # Errors
/// It is in use.
pub fn detach(device: &Path) -> Result<()> {
    run(Command::new("losetup").arg("-d").arg(device)).map(drop)
}

/// A mounted file system.
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts an ext4, with these options, whose journal is replayed if need be.
    ///
    /// # Errors
    /// It is damaged.
    pub fn new(source: &Path, place: &Path, options: &str) -> Result<Self> {
        run(Command::new("mount").args(["-t", "ext4", "-o", options]).args([source, place]))?;
        Ok(Self(place.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // If it is in use, whoever wants what is under it finds out.
        let _ = run(Command::new("umount").arg(&self.0));
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {complaint}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
