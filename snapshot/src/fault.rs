//! What can be wrong with a file that is read.
//!
//! In: what a check found. Out: one line that names the thing and says what was expected. Holds: an outer error names
//! the path, its source names the fault, so that the printed chain says each once.

use crate::{ManifestError, SectionError};
use std::{io, path::PathBuf};

/// A file could not be opened as a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host would not open it.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is a directory, a device, a socket.
    #[error("{} is {found}, not a snapshot file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
}

/// A file is no snapshot, or a damaged one.
#[derive(Debug, thiserror::Error)]
#[error("{} is not a usable snapshot", path.display())]
pub struct VerifyError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a snapshot, its RAM aside.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The host failed to read.
    #[error("cannot read {what}")]
    Read {
        /// The part that was wanted.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// The file starts with something else.
    #[error("not an ELF file: it starts with {found:02x?}, expected [7f, 45, 4c, 46]")]
    NotElf {
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// The file is shorter than its headers say.
    #[error("truncated: {what} end{} at byte {end}, but the file has {len} bytes",
            if what.ends_with('s') { "" } else { "s" })]
    Truncated {
        /// The first part that is not there in full.
        what: String,
        /// One past its last byte.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// The file goes on where it should end.
    #[error("RAM ends at byte {end}, but the file has {len} bytes")]
    TooLong {
        /// Where it should end.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// A number in a header is not what it has to be.
    #[error("{what}: {field} is {found:#x}, expected {expected}")]
    Field {
        /// The header.
        what: String,
        /// The field, by its name in the specification.
        field: &'static str,
        /// The value in the file.
        found: u64,
        /// The values allowed.
        expected: String,
    },
    /// A note is malformed.
    #[error("note {index}, {offset} bytes into the notes: {problem}")]
    Note {
        /// Counted from 0.
        index: usize,
        /// Of the note's header.
        offset: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// A note is absent, or there twice.
    #[error("expected exactly one {what} note (owner VMMSNAP), found {found}")]
    NoteCount {
        /// The note.
        what: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A snapshot of our own layout has a note out of place.
    #[error("note {index} is not the {expected} note that belongs there")]
    NoteOrder {
        /// Counted from 0.
        index: usize,
        /// What should be there.
        expected: &'static str,
    },
    /// The file is of another version.
    #[error("format version {found}; this program reads version {}", crate::FORMAT_VERSION)]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// A part's length is not the one recorded.
    #[error("{what}: {found} bytes long, expected {expected}")]
    Length {
        /// The part.
        what: String,
        /// Its length in the file.
        found: u64,
        /// The length it should have.
        expected: u64,
    },
    /// A part's CRC is not the one recorded.
    #[error("{what}: CRC-32 is {found:08x}, expected {expected:08x}")]
    Checksum {
        /// The part.
        what: String,
        /// Of the bytes in the file.
        found: u32,
        /// As recorded.
        expected: u32,
    },
    /// A byte that has to be zero is not.
    #[error("byte {offset} is {found:#04x}, expected zero padding")]
    Padding {
        /// In the file.
        offset: u64,
        /// The byte.
        found: u8,
    },
    /// The manifest's bytes are no manifest.
    #[error("the manifest does not decode")]
    Decode(#[source] SectionError),
    /// The manifest contradicts itself.
    #[error("the manifest is wrong")]
    Manifest(#[source] ManifestError),
    /// The program headers and the manifest disagree.
    #[error("the RAM ranges of the program headers and of the manifest differ at GPA {gpa:#x}")]
    Ranges {
        /// Start of the first range that only one of them has.
        gpa: u64,
    },
    /// The file holds only what changed since another.
    #[error(
        "an incremental snapshot: it needs its parent {parent}, and this version restores full ones only"
    )]
    Incremental {
        /// The parent's generation id.
        parent: crate::GenerationId,
    },
}

/// RAM in a snapshot is not what was saved.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host failed to read.
    #[error("{}: cannot read RAM at GPA {gpa:#x}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Start of the chunk.
        gpa: u64,
        /// What the host said.
        source: io::Error,
    },
    /// A chunk differs from its digest.
    #[error("{}: the RAM chunk at GPA {gpa:#x} ({len} bytes) has digest {found:016x}, expected {expected:016x}",
            path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Start of the chunk.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// Of the bytes in the file.
        found: u64,
        /// As recorded.
        expected: u64,
    },
}
