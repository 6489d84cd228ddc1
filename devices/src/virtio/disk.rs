//! What a block device asks of the host: whole operations on a disk, begun now and done later.
//!
//! In: an [`Operation`] whose bytes lie in guest RAM. Out: a [`Completion`] under the same token, and an event that says
//! that there is one. Holds: a disk copies nothing on the way, and touches guest RAM for none but its unfinished operations.

use super::Segments;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes of a sector, whatever the disk's own blocks are (section 5.2.4).
pub const SECTOR: u64 = 512;

/// What a driver wants of a disk, checked against its size. Any may be done a second time, as long as nothing that was
/// asked for after its completion has been done: so what a snapshot finds unfinished is simply begun anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// From the disk into guest RAM.
    Read {
        /// Byte on the disk.
        offset: u64,
        /// Where to.
        into: Segments,
    },
    /// From guest RAM to the disk.
    Write {
        /// Byte on the disk.
        offset: u64,
        /// Where from.
        from: Segments,
    },
    /// What was written by operations that are done outlives a power cut.
    Flush,
    /// The bytes are of no more use. A disk may ignore it.
    Discard {
        /// Byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The bytes become zero.
    WriteZeroes {
        /// Byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether their space may be given back.
        unmap: bool,
    },
}

impl Operation {
    /// Whether the disk's contents change.
    pub fn writes(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Flush)
    }

    /// The bytes of the disk that it is about: the first, and their number. None for [`Operation::Flush`].
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Read { offset, into: segments } | Self::Write { offset, from: segments } => {
                Some((*offset, segments.len()))
            }
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len, .. } => Some((*offset, *len)),
            Self::Flush => None,
        }
    }
}

/// An operation is done, or failed.
#[derive(Debug)]
pub struct Completion {
    /// As given to [`DiskEngine::submit`].
    pub token: u16,
    /// What the host said.
    pub result: io::Result<()>,
}

/// A disk of the host. Nothing here waits for the disk, but for dropping it: that waits until nothing is under way.
pub trait DiskEngine: Send {
    /// Bytes.
    fn size(&self) -> u64;
    /// Takes an operation in. No two that are under way have one token.
    fn submit(&mut self, token: u16, operation: &Operation);
    /// Has the host begin what was taken in.
    fn start(&mut self);
    /// Readable once an operation is done, until [`DiskEngine::completed`] is called.
    fn event(&self) -> BorrowedFd<'_>;
    /// What is done.
    fn completed(&mut self) -> Vec<Completion>;
}
