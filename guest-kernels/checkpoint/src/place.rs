//! Where what must outlive a kernel is kept.
//!
//! In: nothing. Out: paths in `/persist/.checkpoint`, and the record of the workload. Holds: a record is whole, because it
//! is renamed into place.

use anyhow::{Context, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The file system that goes from kernel to kernel.
pub(crate) const PERSIST: &str = "/persist";
/// Ours on it.
pub(crate) const HOME: &str = "/persist/.checkpoint";
const IMAGES: &str = "/persist/.checkpoint/images";
const RECORD: &str = "/persist/.checkpoint/record";

/// The workload there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) name: String,
    /// Of its first process, as this kernel counts.
    pub(crate) pid: i32,
}

impl Record {
    pub(crate) fn read() -> Result<Option<Record>> {
        match fs::read_to_string(RECORD) {
            Ok(text) => Record::parse(&text).map(Some).with_context(|| format!("{RECORD} is no record")),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context(format!("cannot read {RECORD}")),
        }
    }

    pub(crate) fn write(&self) -> Result<()> {
        put(RECORD, &format!("name={}\npid={}\n", self.name, self.pid))
    }

    fn parse(text: &str) -> Option<Record> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Some(Record { name: field("name")?.to_owned(), pid: field("pid")?.parse().ok()? })
    }

    /// Whether its first process is there. The number may be another's on another kernel, which our own program tells.
    pub(crate) fn runs(&self) -> bool {
        let exe = fs::read_link(format!("/proc/{}/exe", self.pid));
        exe.is_ok_and(|exe| exe == Path::new(HOME).join("init"))
    }
}

/// Replaces a file of ours.
pub(crate) fn put(path: &str, text: &str) -> Result<()> {
    let unfinished = format!("{path}.unfinished");
    fs::write(&unfinished, text)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {path}"))
}

/// A directory with one dump.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    pub(crate) dir: PathBuf,
}

impl Images {
    /// The newest, with whether it is a whole dump, on its own or upon others.
    pub(crate) fn newest() -> Result<Option<Images>> {
        Ok(numbers()?.max().map(|number| Images { dir: Path::new(IMAGES).join(number.to_string()) }))
    }

    /// A new one after the newest.
    pub(crate) fn next() -> Result<Images> {
        let number = numbers()?.max().map_or(0, |number| number + 1);
        let dir = Path::new(IMAGES).join(number.to_string());
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Images { dir })
    }

    /// What it takes.
    pub(crate) fn bytes(&self) -> Result<u64> {
        let files = fs::read_dir(&self.dir)?;
        files.map(|file| Ok(file?.metadata()?.len())).sum()
    }
}

fn numbers() -> Result<impl Iterator<Item = u32>> {
    let entries = match fs::read_dir(IMAGES) {
        Ok(entries) => Some(entries),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(e).context(format!("cannot read {IMAGES}")),
    };
    Ok(entries.into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// Removes all dumps.
pub(crate) fn forget_images() -> Result<()> {
    match fs::remove_dir_all(IMAGES) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).context(format!("cannot remove {IMAGES}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_needs_a_name_and_a_number() {
        let record = Record::parse("name=web\npid=312\n").unwrap();
        assert_eq!((record.name.as_str(), record.pid), ("web", 312));
        assert_eq!(Record::parse("name=web\n"), None);
        assert_eq!(Record::parse("name=web\npid=x\n"), None);
    }
}
