//! The cache outside git.
//!
//! In: the environment, and closures that fill a directory. Out: paths below [`cache_dir`]. Holds: a directory that
//! [`publish`] made is whole, because it was filled under another name and renamed; two processes that want the same one
//! wait for each other.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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

/// Notes that `dir`, if it is there, is in use: its time of modification is now.
pub(crate) fn touch(dir: &Path) {
    // Who can't note it has it made anew some day.
    let _ = File::open(dir).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes the directories beside `dir` whose names begin with `prefix` and that nobody has touched for so long.
pub(crate) fn prune(dir: &Path, prefix: &str, unused: Duration) -> Result<()> {
    let place = dir.parent().context("a cache entry needs a place")?;
    for entry in fs::read_dir(place).with_context(|| format!("cannot read {}", place.display()))? {
        let entry = entry?;
        let modified = entry.metadata().and_then(|about| about.modified());
        let age = modified.ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
        if age > unused && entry.file_name().to_string_lossy().starts_with(prefix) {
            remove(&entry.path())?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_asked_for_goes_and_nothing_else() {
        let place = std::env::temp_dir().join(format!("vmm-cache-test-{}", std::process::id()));
        let month = Duration::from_secs(30 * 86_400);
        for name in ["made-old", "made-new", "other-old", "made-touched"] {
            create_dir(&place.join(name)).unwrap();
            let old = SystemTime::now() - month - Duration::from_secs(60);
            let then = if name == "made-new" { SystemTime::now() } else { old };
            File::open(place.join(name)).unwrap().set_modified(then).unwrap();
        }
        touch(&place.join("made-touched"));
        prune(&place.join("made-new"), "made-", month).unwrap();
        let left: Vec<_> = ["made-old", "made-new", "other-old", "made-touched"]
            .into_iter()
            .filter(|name| place.join(name).exists())
            .collect();
        remove(&place).unwrap();
        assert_eq!(left, ["made-new", "other-old", "made-touched"]);
    }
}
