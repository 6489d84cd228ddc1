//! Whole files: a file appears under its name complete and durable, or what was there stays.
//!
//! In: a path and bytes. Out: the file under that name. Holds: until [`NewFile::publish`] the file has no name, so that it ends
//! with the process, however that ends. Where a file system has no nameless files (NFS, FAT), it has one that starts with
//! [`TEMPORARY`]; dropping it on any error path removes it, and only a killed process leaves one behind.

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

/// How the names of unfinished files start.
pub const TEMPORARY: &str = ".vmmsnap-tmp-";
/// Owner only: a guest's memory has its secrets in it.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A file could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The path names something that a file must not replace.
    #[error("{} is {found}, not a regular file: choose another name", path.display())]
    Target {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The path names no file at all.
    #[error("{} does not name a file", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The file is there under its name, but a power cut may bring back what was there before.
    #[error("{} is written, but its directory cannot be synced", path.display())]
    Unsynced {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused a step.
    #[error("cannot {step} {}", path.display())]
    Io {
        /// What was to be done.
        step: &'static str,
        /// The path that was asked for.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A file that is not there yet.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    directory: File,
    /// The name it has while it is not whole, or shortly before it is.
    temporary: PathBuf,
    named: bool,
    target: PathBuf,
}

impl NewFile {
    /// An empty file, readable and writable by its owner, in the directory of `target`. If `target` is a symbolic
    /// link, the file it points to is the one to be replaced.
    ///
    /// # Errors
    /// `target` is there and no regular file, or its directory takes no new file.
    pub fn create(target: &Path) -> Result<Self, PublishError> {
        let target = resolve(target)?;
        let failed = |step| failed(step, &target);
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(parent).map_err(failed("open the directory of"))?;
        let temporary = parent.join(temporary_name().map_err(failed("find a temporary name for"))?);
        let (file, named) = open(parent, &temporary).map_err(failed("create a file beside"))?;
        Ok(Self { file, directory, temporary, named, target })
    }

    /// The file, to be written to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs the file, gives it its name, and syncs the directory, so that the name outlives a power cut.
    ///
    /// # Errors
    /// The step that the host refused. What was there before is still there, unless it is [`PublishError::Unsynced`].
    pub fn publish(self) -> Result<(), PublishError> {
        let failed = |step| failed(step, &self.target);
        self.file.sync_all().map_err(failed("sync"))?;
        // A link can't replace a file, a rename can.
        if !self.named {
            link(&self.file, &self.temporary).map_err(failed("name the finished file beside"))?;
        }
        fs::rename(&self.temporary, &self.target).map_err(failed("rename the finished file to"))?;
        let unsynced = |source| PublishError::Unsynced { path: self.target.clone(), source };
        self.directory.sync_all().map_err(unsynced)
    }
}

impl Drop for NewFile {
    /// Without a name, and after a rename, there is nothing to remove.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// A new file, and whether it has this temporary name.
fn open(parent: &Path, temporary: &Path) -> io::Result<(File, bool)> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::io::retry_on_intr(|| rustix::fs::open(parent, flags | OFlags::TMPFILE, MODE)) {
        Ok(file) => Ok((file.into(), false)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let flags = flags | OFlags::CREATE | OFlags::EXCL;
            let file = rustix::io::retry_on_intr(|| rustix::fs::open(temporary, flags, MODE))?;
            Ok((file.into(), true))
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives a nameless file a name, as open(2) shows it.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, nameless, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
}

/// A name for a file that is needed for a while, beside another; the file is removed with it.
#[derive(Debug)]
pub struct Temporary(PathBuf);

impl Temporary {
    /// In the directory of `target`, where there is no file yet.
    ///
    /// # Errors
    /// `target` is there and no regular file, or there are no random bytes for a name.
    pub fn beside(target: &Path) -> Result<Self, PublishError> {
        let target = resolve(target)?;
        let name = temporary_name().map_err(failed("find a temporary name for", &target))?;
        Ok(Self(target.with_file_name(name)))
    }

    /// Where the file may be.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Has the file stay, under this name.
    ///
    /// # Errors
    /// The host refuses; the file stays where it is.
    pub fn keep_as(self, name: &Path) -> io::Result<()> {
        let path = std::mem::ManuallyDrop::new(self);
        fs::rename(&path.0, name)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn failed<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> PublishError + 'a {
    move |source| PublishError::Io { step, path: path.to_owned(), source }
}

fn temporary_name() -> io::Result<String> {
    let id = crate::GenerationId::random()?;
    Ok(format!("{TEMPORARY}{}-{id}", std::process::id()))
}

/// The path to be replaced: links followed, and anything but a regular file refused.
fn resolve(target: &Path) -> Result<PathBuf, PublishError> {
    let path = target.to_owned();
    if target.file_name().is_none() {
        return Err(PublishError::NoName { path });
    }
    let kind = match fs::symlink_metadata(target) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
        Err(error) => return Err(failed("look at", target)(error)),
    };
    if kind.is_symlink() {
        return resolve(&fs::canonicalize(target).map_err(failed("follow the link", target))?);
    }
    match describe(kind) {
        None => Ok(path),
        Some(found) => Err(PublishError::Target { path, found }),
    }
}

/// What this is, unless it is a regular file.
pub(crate) fn describe(kind: fs::FileType) -> Option<&'static str> {
    match kind {
        _ if kind.is_file() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_block_device() || kind.is_char_device() => Some("a device"),
        _ if kind.is_fifo() => Some("a pipe"),
        _ if kind.is_socket() => Some("a socket"),
        _ => Some("a file of an unknown kind"),
    }
}
