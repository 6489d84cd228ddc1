//! The working set: what a guest uses first after a restore.
//!
//! In: a machine that was just let run; a list beside its snapshot. Out: that list; its pages, fetched before the guest asks for them.
//! Holds: a list is of one snapshot and names no memory that it has not; the guest waits for nothing of it.
//!
//! ```text
//! web.snapshot.workingset      vmm working set 1
//!                              snapshot e91a09caf90d67ff64ed37807842ee85
//!                              0x100000 0x5000           address and bytes in the guest, hexadecimal, in order
//! ```

use crate::layout::PAGE_SIZE;
use crate::ram::GuestRam;
use crate::timing::{self, FirstRun};
use snapshot::publish::{NewFile, PublishError};
use snapshot::{RamRange, Snapshot};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FIRST_LINE: &str = "vmm working set 1";
const SNAPSHOT: &str = "snapshot ";
const EXTENSION: &str = "workingset";
/// Longest list that is read.
const LONGEST: u64 = 16 << 20;
/// Pages between two that are used are fetched along with them if they are no more than this: one request costs more.
const GAP: u64 = 32 << 10;

/// Why there is no working set.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// There is no list, or it can't be read.
    #[error("cannot read {path}, which `vmm restore --record-working-set` writes")]
    Read {
        /// The list.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// It is none.
    #[error("{path}, line {line}: expected {expected}")]
    Line {
        /// The list.
        path: String,
        /// Which line, from 1.
        line: usize,
        /// What should be there.
        expected: &'static str,
    },
    /// It is another snapshot's.
    #[error("{path} is of snapshot {found}; this one is {expected}")]
    Other {
        /// The list.
        path: String,
        /// The snapshot that it names.
        found: String,
        /// The one that is restored.
        expected: String,
    },
    /// The host doesn't tell what was used.
    #[error("cannot tell what memory the guest has used")]
    Used(#[source] io::Error),
    /// It can't be written.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The same.
    #[error("cannot write {path}")]
    Write {
        /// The list.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no thread to give.
    #[error("cannot start a thread to fetch the working set")]
    Thread(#[source] io::Error),
}

/// Where the list of a snapshot is.
pub fn path(snapshot: &Path) -> PathBuf {
    snapshot.with_added_extension(EXTENSION)
}

/// Waits until the guest needs no new memory, and writes the list of what it has used. Returns where, and how many bytes that are; none if
/// it did not run.
///
/// # Errors
/// The host doesn't tell, or takes no list.
pub fn record(
    snapshot: &Path,
    generation: &str,
    ram: &GuestRam,
    first: &Arc<FirstRun>,
) -> Result<Option<(PathBuf, u64)>, WorkingSetError> {
    if timing::settle(first).is_none() {
        return Ok(None);
    }
    let used = ram.used(GAP).map_err(WorkingSetError::Used)?;
    let path = path(snapshot);
    let list = NewFile::create(&path)?;
    let written = list.file().write_all(encode(generation, &used).as_bytes());
    written.map_err(|source| WorkingSetError::Write { path: path.display().to_string(), source })?;
    list.publish()?;
    Ok(Some((path, used.iter().map(|range| range.len).sum())))
}

/// Fetches what the list beside the snapshot names, in a thread of its own.
///
/// # Errors
/// There is no list, it is another snapshot's, or none.
pub fn prefetch(snapshot: &Snapshot, ram: &GuestRam) -> Result<(), WorkingSetError> {
    let path = path(snapshot.path());
    let name = || path.display().to_string();
    let text = read(&path).map_err(|source| WorkingSetError::Read { path: name(), source })?;
    let manifest = snapshot.manifest();
    let expected = manifest.about.generation.to_string();
    let ranges = decode(&text, &expected, &manifest.ram.ranges).map_err(|fault| fault.at(name()))?;
    let ram = ram.clone();
    let fetch = move || {
        // The host reads while it is asked for more.
        ranges.iter().for_each(|range| ram.ask_for(range));
        ranges.iter().for_each(|range| ram.map_ahead(range));
    };
    let thread = std::thread::Builder::new().name("prefetch".to_owned()).spawn(fetch);
    thread.map(drop).map_err(WorkingSetError::Thread)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

fn encode(generation: &str, ranges: &[RamRange]) -> String {
    let lines = ranges.iter().map(|RamRange { gpa, len }| format!("{gpa:#x} {len:#x}\n"));
    format!("{FIRST_LINE}\n{SNAPSHOT}{generation}\n{}", lines.collect::<String>())
}

#[derive(Debug, PartialEq, Eq)]
enum ListFault {
    Line(usize, &'static str),
    Other { found: String, expected: String },
}

impl ListFault {
    fn at(self, path: String) -> WorkingSetError {
        match self {
            Self::Line(line, expected) => WorkingSetError::Line { path, line, expected },
            Self::Other { found, expected } => WorkingSetError::Other { path, found, expected },
        }
    }
}

/// The ranges of a list of this snapshot, each within one of `ram`'s.
fn decode(text: &str, generation: &str, ram: &[RamRange]) -> Result<Vec<RamRange>, ListFault> {
    let mut lines = (1..).zip(text.lines());
    if lines.next().is_none_or(|(_, line)| line != FIRST_LINE) {
        return Err(ListFault::Line(1, "`vmm working set 1`"));
    }
    let of = lines.next().and_then(|(_, line)| line.strip_prefix(SNAPSHOT));
    match of.ok_or(ListFault::Line(2, "`snapshot` and its id"))? {
        found if found == generation => {}
        found => {
            return Err(ListFault::Other { found: found.to_owned(), expected: generation.to_owned() });
        }
    }
    let (mut ranges, mut end) = (Vec::new(), 0);
    for (number, line) in lines {
        let range = range(line).filter(|range| range.gpa >= end && is_within(range, ram));
        let range = range.ok_or(ListFault::Line(number, "whole pages of the guest's RAM, in order"))?;
        end = range.gpa + range.len;
        ranges.push(range);
    }
    Ok(ranges)
}

fn range(line: &str) -> Option<RamRange> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (gpa, len) = line.split_once(' ')?;
    let (gpa, len) = (number(gpa)?, number(len)?);
    let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
    (whole && gpa.checked_add(len).is_some()).then_some(RamRange { gpa, len })
}

fn is_within(range: &RamRange, ram: &[RamRange]) -> bool {
    ram.iter().any(|other| other.gpa <= range.gpa && range.gpa + range.len <= other.gpa + other.len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: [RamRange; 2] = [RamRange { gpa: 0, len: 0x8000 }, RamRange { gpa: 1 << 32, len: 0x4000 }];
    const LIST: [RamRange; 2] =
        [RamRange { gpa: 0x1000, len: 0x2000 }, RamRange { gpa: 1 << 32, len: 0x4000 }];

    #[test]
    fn a_list_is_read_as_it_was_written() {
        assert_eq!(decode(&encode("id", &LIST), "id", &RAM), Ok(LIST.to_vec()));
        assert_eq!(decode(&encode("id", &[]), "id", &RAM), Ok(Vec::new()));
    }

    #[test]
    fn another_snapshots_list_is_refused() {
        let other = ListFault::Other { found: "that".to_owned(), expected: "this".to_owned() };
        assert_eq!(decode(&encode("that", &LIST), "this", &RAM), Err(other));
    }

    #[test]
    fn what_is_no_list_is_refused_by_its_line() {
        let line = |text: &str| match decode(text, "id", &RAM) {
            Err(ListFault::Line(line, _)) => line,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!((line(""), line("vmm working set 2\n"), line("vmm working set 1\n")), (1, 1, 2));
        for bad in [
            "0x1000",
            "0x1000 0x0",
            "0x1001 0x1000",
            "4096 4096",
            "0x1000 0x10000",
            "0x8000 0x1000",
            "0x7000 0x2000",
            "0xfffffffffffff000 0x1000",
            "0xfffffffffffff000 0x2000",
            "0x0 0x1000\n0x0 0x1000",
        ] {
            let text = format!("{}{bad}\n", encode("id", &[]));
            assert_eq!(line(&text), text.lines().count(), "{bad}");
        }
    }
}
