//! RAM, chunk after chunk, from the file into place.
//!
//! In: the file, of which all but RAM has been checked, the map of its holes, zeroed RAM. Out: RAM as the file has it, with
//! the digests that the chunk table has. Holds: what is digested has been copied before; a zero page is never written, so
//! that it costs the host nothing. Each chunk is looked at before the one before it is copied, so that the monitor can get its pages
//! meanwhile.

use crate::ports::control;
use crate::{abi, near_ram, read_image};
use core::arch::x86_64;
use core::ops::Range;
use snapshot_format::chunk::{self, Digest};
use snapshot_format::{CHUNK_SIZE, Fault, Image, MappedRange, PAGE_SIZE, RamRange};

const PAGE: usize = PAGE_SIZE as usize;

/// The widest register of the processor that this is built for.
#[cfg(target_feature = "avx512f")]
type Vector = x86_64::__m512i;
#[cfg(all(target_feature = "avx2", not(target_feature = "avx512f")))]
type Vector = x86_64::__m256i;
#[cfg(not(target_feature = "avx2"))]
type Vector = x86_64::__m128i;
/// Bytes that are copied without a jump.
const BLOCK: usize = 4 * size_of::<Vector>();

/// A bit for each page of a chunk: 1 where it has anything but zeroes.
pub(crate) type Pages = [u64; abi::NEAR_PAGES_LEN];

const _: () = assert!(CHUNK_SIZE <= abi::STAGED_MAX && CHUNK_SIZE / PAGE_SIZE == 64 * abi::NEAR_PAGES_LEN as u64);

/// What was done.
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) runs: u64,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) digest: u64,
}

/// Where RAM comes from.
#[derive(Clone, Copy)]
struct Source<'a> {
    file: &'a [u8],
    holes: &'a [u8],
}

/// A chunk that has been looked at.
struct Chunk<'a> {
    place: RamRange,
    /// Its bytes: in the file, or a copy.
    bytes: &'a [u8],
    data: Pages,
}

/// A pass over all RAM, in the order of the table.
pub(crate) struct Overlay<'a> {
    source: Source<'a>,
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
        let source = Source { file, holes };
        Self { source, table: image.notes.table, zero_digest, chunks: 0, digests, report }
    }

    /// Fills one range.
    pub(crate) fn range(&mut self, mapped: &MappedRange, ram: &mut [u8]) -> Result<(), Fault> {
        let (source, ranges) = (self.source, [mapped.range]);
        let start = |place: &RamRange| (place.gpa - mapped.range.gpa) as usize;
        let mut ahead =
            chunk::chunks(&ranges).map(|place| source.look_at(place, mapped.offset as usize + start(&place)));
        let mut next = ahead.next();
        while let Some(chunk) = next {
            next = ahead.next();
            let start = start(&chunk.place);
            self.chunk(&chunk, &mut ram[start..start + chunk.bytes.len()])?;
        }
        Ok(())
    }

    /// What was done, with a digest of all digests.
    pub(crate) fn report(&self) -> Report {
        Report { digest: self.digests.value(), ..self.report }
    }

    fn chunk(&mut self, chunk: &Chunk<'_>, ram: &mut [u8]) -> Result<(), Fault> {
        let RamRange { gpa, len } = chunk.place;
        let found = self.fill(chunk, ram);
        let expected = chunk::digests(self.table).nth(self.chunks).unwrap_or(!found);
        if found != expected {
            return Err(Fault::Digest { gpa, len, found, expected });
        }
        self.digests.update(&found.to_le_bytes());
        self.chunks += 1;
        Ok(())
    }

    /// Copies what is not zero, and digests what is in RAM then.
    fn fill(&mut self, chunk: &Chunk<'_>, ram: &mut [u8]) -> u64 {
        let pages = ram.len() / PAGE;
        if chunk.data != Pages::default() {
            control(abi::NEAR_NOW);
        } else if pages == CHUNK_SIZE as usize / PAGE {
            self.report.zero_pages += pages as u64;
            return self.zero_digest;
        }
        let (mut digest, mut report, mut at) = (Digest::default(), self.report, 0);
        while at < pages {
            let data = is_set(&chunk.data, at);
            let end = (at + 1..pages).find(|page| is_set(&chunk.data, *page) != data).unwrap_or(pages);
            let run = at * PAGE..end * PAGE;
            if data {
                copy(chunk.bytes, ram, run.clone());
                digest.update(&ram[run]);
                report.pages += (end - at) as u64;
                report.runs += 1;
            } else {
                (at..end).for_each(|_| digest.update_zero_page());
                report.zero_pages += (end - at) as u64;
            }
            at = end;
        }
        self.report = report;
        digest.value()
    }
}

impl<'a> Source<'a> {
    /// Finds what is not zero, and tells the monitor of it.
    fn look_at(&self, place: RamRange, offset: usize) -> Chunk<'a> {
        let mut bytes = &self.file[offset..offset + place.len as usize];
        let mut data = Pages::default();
        let is_hole = |page: usize| self.is_hole(offset / PAGE + page);
        if (0..bytes.len() / PAGE).any(|page| !is_hole(page)) {
            bytes = read_image(offset as u64, place.len);
            for (page, bytes) in bytes.chunks(PAGE).enumerate() {
                let zero = is_hole(page) || chunk::is_zero(bytes);
                data[page / 64] |= u64::from(!zero) << (page % 64);
            }
        }
        if data != Pages::default() {
            near_ram(place.gpa, &data);
        }
        Chunk { place, bytes, data }
    }

    fn is_hole(&self, page: usize) -> bool {
        self.holes.get(page / 8).is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }
}

fn is_set(pages: &Pages, page: usize) -> bool {
    pages.get(page / 64).is_some_and(|bits| bits >> (page % 64) & 1 == 1)
}

/// Copies whole pages.
fn copy(from: &[u8], to: &mut [u8], range: Range<usize>) {
    let (from, to) = (&from[range.clone()], &mut to[range]);
    let (from, to) = (from.as_chunks::<BLOCK>().0, to.as_chunks_mut::<BLOCK>().0);
    for (from, to) in from.iter().zip(to) {
        let (from, to) = (from.as_ptr().cast::<Vector>(), to.as_mut_ptr().cast::<Vector>());
        // SAFETY: within both blocks, which begin with a multiple of their size. Volatile, or the compiler calls memcpy.
        unsafe {
            let (a, b) = (from.read_volatile(), from.add(1).read_volatile());
            let (c, d) = (from.add(2).read_volatile(), from.add(3).read_volatile());
            to.write_volatile(a);
            to.add(1).write_volatile(b);
            to.add(2).write_volatile(c);
            to.add(3).write_volatile(d);
        }
    }
}
