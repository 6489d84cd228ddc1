//! Whole files: a file appears under its name complete and durable, or what was there stays.
//!
//! In: a path and bytes. Out: the file under that name. Holds: until [`NewFile::publish`] renames it, the file has a
//! name of its own that starts with [`TEMPORARY`], and dropping it on any error path removes it. Only a killed process
//! leaves one behind, which that name shows for what it is.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// How the names of unfinished files start.
pub const TEMPORARY: &str = ".vmmsnap-tmp-";
/// Owner only: a guest's memory has its secrets in it.
const MODE: u32 = 0o600;

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
    temporary: PathBuf,
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
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(MODE).open(&temporary);
        let file = file.map_err(failed("create a file beside"))?;
        Ok(Self { file, directory, temporary, target })
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
    /// The step that the host refused. Up to the rename, what was there before is still there; if only the
    /// directory's sync fails, the new file is in its place.
    pub fn publish(self) -> Result<(), PublishError> {
        let failed = |step| failed(step, &self.target);
        self.file.sync_all().map_err(failed("sync"))?;
        fs::rename(&self.temporary, &self.target).map_err(failed("rename the finished file to"))?;
        self.directory.sync_all().map_err(failed("sync the directory of"))
    }
}

impl Drop for NewFile {
    /// After a rename the name is gone, and there is nothing to remove.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
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
