//! The cache outside git.
//!
//! In: the environment, and closures that fill a directory. Out: paths below [`cache_dir`]. Holds: a directory that
//! [`publish`] made is whole, because it was filled under another name and renamed; two processes that want the same one
//! wait for each other.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Where fetched and built files are kept: `$VMM_CACHE`, else `$XDG_CACHE_HOME/vmm`, else `$HOME/.cache/vmm`. It is
/// created if need be.
///
/// # Errors
/// None of the variables is set, or the directory can't be made.
pub fn cache_dir() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = variable("VMM_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("vmm")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/vmm")))
        .context("no place for the cache: set VMM_CACHE, XDG_CACHE_HOME or HOME")?;
    create_dir(&dir)?;
    std::path::absolute(&dir).with_context(|| format!("cannot resolve {}", dir.display()))
}

/// Makes a directory and its parents.
pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create the directory {}", dir.display()))
}

/// Waits until no other process holds the lock of this name; the lock ends with the returned file.
pub(crate) fn lock(name: &str) -> Result<File> {
    let dir = cache_dir()?.join("locks");
    create_dir(&dir)?;
    let path = dir.join(name);
    let file = File::create(&path).with_context(|| format!("cannot create the lock {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Makes `dir` with what `fill` puts into it, unless it is there. The name appears only when `fill` has succeeded.
///
/// # Errors
/// What `fill` says, or the cache can't be written.
pub fn publish(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let name = dir.file_name().context("a cache entry needs a name")?.to_string_lossy().into_owned();
    let _lock = lock(&name)?;
    if dir.is_dir() {
        return Ok(());
    }
    let unfinished = dir.with_file_name(format!(".{name}.unfinished"));
    remove(&unfinished)?;
    create_dir(&unfinished)?;
    fill(&unfinished).inspect_err(|_| remove(&unfinished).unwrap_or(()))?;
    fs::rename(&unfinished, dir).with_context(|| format!("cannot publish {}", dir.display()))
}

/// Removes a directory with all that is in it, if it is there.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
