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
    /// A chunk was put in the place of another with the same digest.
    #[error("{}: the RAM chunk at GPA {gpa:#x} ({len} bytes) is not the one that was sealed", path.display())]
    Seal {
        /// The file.
        path: PathBuf,
        /// Start of the chunk.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
}
