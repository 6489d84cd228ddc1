//! The dump that is written when a guest's kernel panics.
//!
//! In: what the user wishes, at the start; a machine whose kernel has panicked. Out: a dump, and one line about it. Holds: a dump that
//! is there already stays: the next one has a number after its name.

use crate::complaint;
use crate::machine::Machine;
use crate::save::SaveError;
use snapshot::Summary;
use snapshot::publish::{NewFile, PublishError};
use std::io;
use std::path::{Path, PathBuf};

/// Most dumps of one name: a guest that panics again and again must not fill the disk with them.
const NAMES_MAX: u32 = 100;

/// What is to be done when a guest's kernel panics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnPanic {
    /// Where the dump goes.
    pub dump: PathBuf,
}

/// A dump was not written.
#[derive(Debug, thiserror::Error)]
enum DumpError {
    #[error("{} and {} more dumps are there already: move some away", .0.display(), NAMES_MAX - 1)]
    Full(PathBuf),
    #[error("cannot look for a free name beside {}", path.display())]
    Look { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Save(#[from] SaveError),
}

impl OnPanic {
    /// Reads what the user wishes.
    ///
    /// # Errors
    /// Another text than `dump=FILE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("dump=") {
            Some(path) if !path.is_empty() => Ok(Self { dump: path.into() }),
            _ => Err("expected dump=FILE".to_owned()),
        }
    }

    /// Finds out while there is still somebody to tell that no file can be had there.
    ///
    /// # Errors
    /// It names a directory or a device, or its directory takes no new file.
    pub fn check(&self) -> Result<(), PublishError> {
        NewFile::create(&self.dump).map(drop)
    }

    /// Writes the dump of a machine whose kernel has panicked, and says so in a line.
    pub fn dump(&self, machine: &mut Machine) -> String {
        let text = match self.try_dump(machine) {
            Ok((path, Summary { data_bytes, .. })) => {
                let mebibytes = data_bytes.div_ceil(1 << 20);
                format!("vmm: the guest's kernel panicked: dump in {}, {mebibytes} MiB", path.display())
            }
            Err(error) => {
                format!("vmm: the guest's kernel panicked: no dump: {}", complaint::one_line(&error))
            }
        };
        complaint::printable(&text)
    }

    fn try_dump(&self, machine: &mut Machine) -> Result<(PathBuf, Summary), DumpError> {
        let path = free_name(&self.dump)?;
        let summary = machine.pause().dump(&path)?;
        Ok((path, summary))
    }
}

/// The name itself if nothing has it, else the first with a number that nothing has.
fn free_name(wanted: &Path) -> Result<PathBuf, DumpError> {
    let numbered = |number| match number {
        0 => wanted.to_owned(),
        _ => wanted.with_added_extension(number.to_string()),
    };
    for path in (0..NAMES_MAX).map(numbered) {
        match path.symlink_metadata() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(source) => return Err(DumpError::Look { path, source }),
        }
    }
    Err(DumpError::Full(wanted.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dump_can_be_wished_for() {
        let dump = PathBuf::from("/tmp/a=b");
        assert_eq!(OnPanic::parse("dump=/tmp/a=b"), Ok(OnPanic { dump }));
        for text in ["", "dump", "dump=", "/tmp/a", "reset"] {
            assert_eq!(OnPanic::parse(text), Err("expected dump=FILE".to_owned()), "{text}");
        }
    }

    #[test]
    fn an_older_dump_stays() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = dir.path().join("dump");
        for number in 0..NAMES_MAX {
            let path = free_name(&wanted).unwrap();
            let expected = if number == 0 { "dump".to_owned() } else { format!("dump.{number}") };
            assert_eq!(path.file_name().unwrap().to_str(), Some(expected.as_str()));
            std::fs::write(path, "").unwrap();
        }
        let error = free_name(&wanted).unwrap_err().to_string();
        assert!(error.ends_with("dump and 99 more dumps are there already: move some away"), "{error}");
    }

    #[test]
    fn a_place_that_takes_no_file_is_told_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let place = |dump: PathBuf| OnPanic { dump }.check().map_err(|error| error.to_string());
        assert_eq!(place(dir.path().join("dump")), Ok(()));
        assert!(place(dir.path().to_owned()).unwrap_err().contains("is a directory"));
        assert!(place(dir.path().join("no/dump")).unwrap_err().contains("cannot open the directory of"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
