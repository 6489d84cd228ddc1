//! Parts of the file where the stub has memory already.
//!
//! In: which part it wants to read. Out: a copy of that part, and the linear address of it. Holds: a copy stays as it is until the next
//! but one is asked for; no byte is looked at.
//!
//! KVM maps a file by pages of 4 KiB. Where it takes an exit for each, to copy it here costs less.

use super::StubError;
use super::cpu::shortened;
use super::image::ImageMapping;
use super::tables::{Plan, StubMemory};
use restore_stub::abi;

/// Buffers in the stub's memory, used by turns.
#[derive(Debug)]
pub(super) struct Staging {
    /// Linear address of the first.
    start: u64,
    turn: u64,
}

impl Staging {
    pub(super) fn new(plan: &Plan) -> Self {
        Self { start: plan.staging, turn: 0 }
    }

    /// Copies `len` bytes of the file from `start` on, without its holes. What is no part of the file is not copied: then it is the file
    /// itself that is told.
    ///
    /// # Errors
    /// The file was shortened, or can't be read.
    pub(super) fn copy(
        &mut self,
        image: &ImageMapping,
        memory: &mut StubMemory,
        start: u64,
        len: u64,
    ) -> Result<u64, StubError> {
        let within = len <= abi::STAGED_MAX && start.checked_add(len).is_some_and(|end| end <= image.len());
        if !within {
            return Ok(abi::IMAGE.saturating_add(start));
        }
        let at = self.start + self.turn * abi::STAGED_MAX;
        self.turn = (self.turn + 1) % abi::STAGED;
        for run in image.data(start..start + len) {
            let len = run.end - run.start;
            let read = |place: &mut [u8]| image.read(place, run.start).map_err(|_| shortened());
            memory.fill(at + (run.start - start), len, read)?;
        }
        Ok(at)
    }
}
