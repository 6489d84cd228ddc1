//! What can be wrong with a file that is read.
//!
//! In: what a check found. Out: one line that names the thing and says what was expected. Holds: an outer error names
//! the path, its source names the fault, so that the printed chain says each once.

use crate::{ManifestError, SectionError};
use std::{fmt, io, path::PathBuf};

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
    /// Its bytes are not those of a snapshot.
    #[error(transparent)]
    Format(#[from] snapshot_format::Fault),
    /// The manifest's bytes are no manifest.
    #[error("the manifest does not decode")]
    Decode(#[source] SectionError),
    /// The list of pages of an incremental snapshot.
    #[error("the list of changed pages is wrong")]
    Delta(#[source] crate::delta::DeltaError),
    /// A seal of another version.
    #[error("its seal is of a version that is not known")]
    Seal,
    /// The manifest contradicts itself.
    #[error("the manifest is wrong")]
    Manifest(#[source] ManifestError),
}

/// RAM under one digest, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Where in the guest it begins.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Whether it is changed pages of an incremental snapshot, the first of which is there.
    pub packed: bool,
}

impl fmt::Display for ChunkPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpa, len, packed } = self;
        match packed {
            false => write!(f, "the RAM chunk at GPA {gpa:#x} ({len} bytes)"),
            true => write!(f, "the chunk of changed pages from GPA {gpa:#x} on ({len} bytes)"),
        }
    }
}

/// RAM in a snapshot is not what was saved.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host failed to read.
    #[error("{}: cannot read {chunk}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What was wanted.
        chunk: ChunkPlace,
        /// What the host said.
        source: io::Error,
    },
    /// A chunk differs from its digest.
    #[error("{}: {chunk} has digest {found:016x}, expected {expected:016x}", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// What differs.
        chunk: ChunkPlace,
        /// Of the bytes in the file.
        found: u64,
        /// As recorded.
        expected: u64,
    },
    /// A chunk was put in the place of another with the same digest.
    #[error("{}: {chunk} is not the one that was sealed", path.display())]
    Seal {
        /// The file.
        path: PathBuf,
        /// What it is in the place of.
        chunk: ChunkPlace,
    },
}
