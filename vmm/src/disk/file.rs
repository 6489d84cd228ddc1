//! The file or block device behind a disk.
//!
//! In: a path. Out: the open file, locked, with its size. Holds: a disk that is written has one user, and one that is only
//! read has no writer; the lock belongs to the open file, so it lasts until the last request that is under way has ended.

use super::Trial;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a qcow2 image begins (QEMU, docs/interop/qcow2.rst).
const QCOW2: [u8; 4] = *b"QFI\xfb";

/// Why a path is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host would not do it.
    #[error("cannot {step} {}", path.display())]
    Io {
        /// What was to be done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Neither file nor block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Not a number of sectors.
    #[error("{} has {size} bytes: expected a multiple of 512, and at least 512", path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// An image with a format of its own.
    #[error("{} is a qcow2 image, which is not supported: convert it with qemu-img convert -O raw", .0.display())]
    Qcow2(PathBuf),
    /// Somebody has the lock.
    #[error("{} is in use as a disk by another VM, or by this one under another id", .0.display())]
    InUse(PathBuf),
}

/// An open disk.
#[derive(Clone, Debug)]
pub struct DiskFile {
    /// The file; the lock goes with it.
    pub file: Arc<File>,
    /// Bytes.
    pub size: u64,
    /// Whether it was opened for reading only.
    pub read_only: bool,
    /// Where it is, absolute; `None` for one that has no name and ends with its VM.
    pub path: Option<PathBuf>,
    /// Where what is written goes as long as it is on trial.
    pub trial: Option<Arc<Trial>>,
}

impl DiskFile {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// The path is no disk, or somebody else uses it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |step| move |source| DiskError::Io { step, path: path.to_owned(), source };
        let path_of_it = std::path::absolute(path).map_err(failed("find"))?;
        // A pipe would make `open` wait.
        let kind = std::fs::metadata(path).map_err(failed("open"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.to_owned()));
        }
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed("open"))?;
        lock(&file, read_only, path)?;
        let disk = Self::of(file, read_only, path)?;
        Ok(Self { path: Some(path_of_it), ..disk })
    }

    /// A disk that is open and nobody else's; `path` is for messages.
    ///
    /// # Errors
    /// It is no run of sectors.
    pub fn of(mut file: File, read_only: bool, path: &Path) -> Result<Self, DiskError> {
        let failed = |step| move |source| DiskError::Io { step, path: path.to_owned(), source };
        let size = file.seek(SeekFrom::End(0)).map_err(failed("find the end of"))?;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(DiskError::Size { path: path.to_owned(), size });
        }
        let mut magic = [0; QCOW2.len()];
        file.read_exact_at(&mut magic, 0).map_err(failed("read"))?;
        if magic == QCOW2 {
            return Err(DiskError::Qcow2(path.to_owned()));
        }
        Ok(Self { file: Arc::new(file), size, read_only, path: None, trial: None })
    }
}

/// `flock(2)`: exclusive for one who writes, shared for those who read.
fn lock(file: &File, read_only: bool, path: &Path) -> Result<(), DiskError> {
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => DiskError::InUse(path.to_owned()),
        TryLockError::Error(source) => DiskError::Io { step: "lock", path: path.to_owned(), source },
    })
}
