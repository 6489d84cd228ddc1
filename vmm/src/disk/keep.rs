//! Copies of disks: those kept beside a snapshot, and the private ones made of them.
//!
//! In: an open disk. Out: a file with the same bytes, which shares them where the file system can (a reflink), and else has
//! holes where they are zero. Holds: a copy has its name once it is whole and synced; a kept one is never written again.

use super::stamp::{CHUNK, Digest, Digester, each_chunk, modified_ns};
use super::{DiskError, DiskFile};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use snapshot::GenerationId;
use snapshot::publish::{NewFile, PublishError};
use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The smallest hole.
const BLOCK: usize = 4096;

/// A disk that is kept beside its snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptDisk {
    /// Its name, in the snapshot's directory.
    pub file: String,
    /// Last change of its bytes, in nanoseconds since 1970.
    pub modified_ns: i128,
}

/// Kept disks whose snapshot isn't written yet. Dropped, they are removed.
#[derive(Default)]
pub(crate) struct Unclaimed(Vec<PathBuf>);

impl Unclaimed {
    /// The snapshot that names them is there.
    pub(crate) fn claim(mut self) {
        self.0.clear();
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// A copy could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// Bytes would have to be copied while the guest stands still.
    #[error(
        "the file system of {} can't make a copy that shares its bytes (a reflink), so a live snapshot can't keep it: leave out --live or --with-disks",
        path.display()
    )]
    NotAtOnce {
        /// Where to.
        path: PathBuf,
    },
    /// The copying itself.
    #[error("cannot copy it to {}", path.display())]
    Copy {
        /// Where to.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The copy's name.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The copy is no disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The directory of a snapshot, which may be a link to one elsewhere, or not be there yet.
pub(super) fn directory(snapshot: &Path) -> PathBuf {
    let target = fs::canonicalize(snapshot).unwrap_or_else(|_| snapshot.to_owned());
    target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// Whether two paths name one file that is there.
pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
    let found = fs::canonicalize(one).ok().zip(fs::canonicalize(other).ok());
    found.is_some_and(|(one, other)| one == other)
}

/// Keeps a disk beside the snapshot: `<snapshot>.<id>.<generation>.disk`. The digest comes for nothing where bytes had to be
/// read. `at_once` allows no reading.
///
/// # Errors
/// The copy can't be made.
pub(crate) fn keep(
    disk: &DiskFile,
    id: &str,
    (snapshot, generation): (&Path, &GenerationId),
    at_once: bool,
    unclaimed: &mut Unclaimed,
) -> Result<(KeptDisk, Option<Digest>), KeepError> {
    let target = fs::canonicalize(snapshot).unwrap_or_else(|_| snapshot.to_owned());
    let stem = target.file_name().unwrap_or_default().to_string_lossy();
    let name = format!("{stem}.{id}.{generation}.disk");
    let path = directory(snapshot).join(&name);
    let new = NewFile::create(&path)?;
    let failed = |source| KeepError::Copy { path: path.clone(), source };
    let digest = if at_once {
        let shared = rustix::fs::ioctl_ficlone(new.file(), &*disk.file);
        shared.map_err(|_| KeepError::NotAtOnce { path: path.clone() })?;
        None
    } else {
        copy(disk, new.file()).map_err(failed)?
    };
    // Nobody writes it again.
    new.file().set_permissions(Permissions::from_mode(0o400)).map_err(failed)?;
    let kept = KeptDisk { file: name, modified_ns: modified_ns(&new.file().metadata().map_err(failed)?) };
    // Even an attempt that fails may leave it under its name.
    unclaimed.0.push(path);
    new.publish()?;
    Ok((kept, digest))
}

/// A private copy without a name: it ends with the VM.
///
/// # Errors
/// Neither the kept disk's directory nor the one for temporary files has room for it.
pub(super) fn private_copy(kept: &DiskFile, directory: &Path) -> Result<DiskFile, KeepError> {
    let temporary = std::env::temp_dir();
    let (file, place) = match nameless(directory) {
        Ok(file) => (file, directory),
        Err(_) => {
            let failed = |source| KeepError::Copy { path: temporary.clone(), source };
            (nameless(&temporary).map_err(failed)?, temporary.as_path())
        }
    };
    copy(kept, &file).map_err(|source| KeepError::Copy { path: place.to_owned(), source })?;
    Ok(DiskFile::of(file, false, place)?)
}

/// A copy under a name that nothing has yet. Until it is written it has the time of its original, by which it is known as a
/// copy: a restore that fails after making it can be tried again.
///
/// # Errors
/// The copy can't be made.
pub(super) fn copy_to(kept: &DiskFile, path: &Path) -> Result<DiskFile, KeepError> {
    let new = NewFile::create(path)?;
    let copied = copy(kept, new.file()).and_then(|_| {
        let modified = kept.file.metadata()?.modified()?;
        new.file().set_times(FileTimes::new().set_modified(modified))
    });
    copied.map_err(|source| KeepError::Copy { path: path.to_owned(), source })?;
    new.publish()?;
    Ok(DiskFile::open(path, false)?)
}

pub(super) fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Returns the digest if the bytes had to be read.
fn copy(from: &DiskFile, to: &File) -> io::Result<Option<Digest>> {
    if rustix::fs::ioctl_ficlone(to, &*from.file).is_ok() {
        return Ok(None);
    }
    to.set_len(from.size)?;
    let mut digester = Digester::default();
    each_chunk(&from.file, from.size, |number, chunk| {
        digester.add(number, chunk);
        write_data(to, number * CHUNK, chunk)
    })?;
    Ok(Some(digester.digest()))
}

/// Leaves holes for what is zero.
pub(crate) fn write_data(to: &File, at: u64, chunk: &[u8]) -> io::Result<()> {
    let is_zero = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
    let blocks: Vec<_> = chunk.chunks(BLOCK).collect();
    let mut offset = at;
    for run in blocks.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let len: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(&run[0]) {
            let start = (offset - at) as usize;
            to.write_all_at(&chunk[start..start + len], offset)?;
        }
        offset += len as u64;
    }
    Ok(())
}
