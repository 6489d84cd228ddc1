//! A disk that stands in for one that is not to be touched.
//!
//! In: a length. Out: a disk of that length. Holds: it reads as zeroes and takes no memory; whatever is written to it fails, so nobody
//! believes that something is on a disk which will be taken away.

use super::DiskFile;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;

impl DiskFile {
    /// One of so many bytes, that says it can be written.
    ///
    /// # Errors
    /// The host has no descriptor, or no file can be so long.
    pub fn stand_in(size: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("stand-in", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(size)?;
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self { file: Arc::new(file), size, read_only: false, path: None, trial: None })
    }
}
