//! RAM, chunk after chunk, from the file into place.
//!
//! In: the file, of which all but RAM has been checked, the map of its holes, zeroed RAM. Out: RAM as the file has it, with
//! the digests that the chunk table has. Holds: what is digested has been copied before; a zero page is never written, so
//! that it costs the host nothing.

use crate::{abi, hint};
use core::arch::asm;
use core::ops::Range;
use snapshot_format::chunk::{self, Digest};
use snapshot_format::{CHUNK_SIZE, Fault, Image, MappedRange, PAGE_SIZE, RamRange};

const PAGE: usize = PAGE_SIZE as usize;

/// What was done.
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) runs: u64,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) digest: u64,
}

/// A pass over all RAM, in the order of the table.
pub(crate) struct Overlay<'a> {
    file: &'a [u8],
    holes: &'a [u8],
    table: &'a [u8],
    /// Of a whole chunk of zeroes.
    zero_digest: u64,
    /// So far.
    chunks: usize,
    digests: Digest,
    report: Report,
}

impl<'a> Overlay<'a> {
    pub(crate) fn new(file: &'a [u8], image: &Image<'a>, holes: &'a [u8]) -> Self {
        let zero_digest = chunk::zero_digest(CHUNK_SIZE);
        let (digests, report) = (Digest::default(), Report::default());
        Self { file, holes, table: image.notes.table, zero_digest, chunks: 0, digests, report }
    }

    /// Fills one range.
    pub(crate) fn range(&mut self, mapped: &MappedRange, ram: &mut [u8]) -> Result<(), Fault> {
        for chunk in chunk::chunks(&[mapped.range]) {
            let start = (chunk.gpa - mapped.range.gpa) as usize;
            let ram = &mut ram[start..start + chunk.len as usize];
            self.chunk(&chunk, mapped.offset as usize + start, ram)?;
        }
        Ok(())
    }

    /// What was done, with a digest of all digests.
    pub(crate) fn report(&self) -> Report {
        Report { digest: self.digests.value(), ..self.report }
    }

    fn chunk(&mut self, chunk: &RamRange, offset: usize, ram: &mut [u8]) -> Result<(), Fault> {
        let RamRange { gpa, len } = *chunk;
        let found = self.fill(gpa, offset, ram);
        let expected = chunk::digests(self.table).nth(self.chunks).unwrap_or(!found);
        if found != expected {
            return Err(Fault::Digest { gpa, len, found, expected });
        }
        self.digests.update(&found.to_le_bytes());
        self.chunks += 1;
        Ok(())
    }

    /// Copies what is not zero, and digests what is in RAM then.
    fn fill(&mut self, gpa: u64, offset: usize, ram: &mut [u8]) -> u64 {
        let file = &self.file[offset..offset + ram.len()];
        let pages = ram.len() / PAGE;
        if (0..pages).any(|page| !self.is_hole(offset / PAGE + page)) {
            hint(abi::NEAR_IMAGE, offset as u64, ram.len() as u64);
        }
        let is_zero = |page: usize| {
            self.is_hole(offset / PAGE + page) || chunk::is_zero(&file[page * PAGE..(page + 1) * PAGE])
        };
        let (mut digest, mut report, mut at) = (Digest::default(), self.report, 0);
        while at < pages {
            let zero = is_zero(at);
            let end = (at + 1..pages).find(|page| is_zero(*page) != zero).unwrap_or(pages);
            if zero && end - at == CHUNK_SIZE as usize / PAGE {
                self.report.zero_pages += pages as u64;
                return self.zero_digest;
            }
            let run = at * PAGE..end * PAGE;
            if zero {
                (at..end).for_each(|_| digest.update_zero_page());
                report.zero_pages += (end - at) as u64;
            } else {
                hint(abi::NEAR_RAM, gpa + run.start as u64, run.len() as u64);
                copy(file, ram, run.clone());
                digest.update(&ram[run]);
                report.pages += (end - at) as u64;
                report.runs += 1;
            }
            at = end;
        }
        self.report = report;
        digest.value()
    }

    fn is_hole(&self, page: usize) -> bool {
        self.holes.get(page / 8).is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }
}

/// Copies whole pages.
fn copy(from: &[u8], to: &mut [u8], range: Range<usize>) {
    let (from, to) = (&from[range.clone()], &mut to[range]);
    // SAFETY: both slices have that many words, and don't overlap; the direction flag is clear.
    unsafe {
        asm!("rep movsq", inout("rcx") from.len() / 8 => _, inout("rsi") from.as_ptr() => _,
             inout("rdi") to.as_mut_ptr() => _, options(nostack, preserves_flags));
    }
}
