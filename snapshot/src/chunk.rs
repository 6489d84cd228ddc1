//! Chunks of RAM, their digests, and the zero pages in them.
//!
//! In: RAM ranges, bytes of chunks. Out: the chunks in table order, digests, runs of pages worth writing. Holds: the
//! table has exactly one digest for each chunk, and a chunk never reaches across two ranges.

use crate::{CHUNK_SIZE, PAGE_SIZE, RamRange};
use std::{ops::Range, sync::LazyLock};

/// Bytes of one digest in the table.
pub(crate) const DIGEST_LEN: u64 = 8;

/// A chunk of zeroes.
static ZEROES: [u8; CHUNK_SIZE as usize] = [0; CHUNK_SIZE as usize];
/// The digest of a whole chunk of zeroes.
static ZERO_DIGEST: LazyLock<u64> = LazyLock::new(|| digest(&ZEROES));

/// The chunks of these ranges, in the order of the table.
pub(crate) fn chunks(ranges: &[RamRange]) -> impl Iterator<Item = RamRange> + '_ {
    ranges.iter().flat_map(|range| {
        (0..range.len.div_ceil(CHUNK_SIZE))
            .map(|index| index * CHUNK_SIZE)
            .map(|start| RamRange { gpa: range.gpa + start, len: (range.len - start).min(CHUNK_SIZE) })
    })
}

/// Number of chunks in these ranges.
pub(crate) fn count(ranges: &[RamRange]) -> u64 {
    ranges.iter().map(|range| range.len.div_ceil(CHUNK_SIZE)).sum()
}

/// XXH3, 64 bits, seed 0.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

/// The digest of `len` zeroes, at most a chunk.
pub(crate) fn zero_digest(len: u64) -> u64 {
    if len == CHUNK_SIZE { *ZERO_DIGEST } else { digest(&ZEROES[..len as usize]) }
}

/// The longest runs of pages that are not all zero, as byte ranges of `chunk`.
pub(crate) fn data_runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in chunk.chunks(PAGE_SIZE as usize).enumerate() {
        let start = index * PAGE_SIZE as usize;
        if *page == ZEROES[..page.len()] {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == start => run.end += page.len(),
            _ => runs.push(start..start + page.len()),
        }
    }
    runs
}

/// The table's bytes.
pub(crate) fn encode_table(digests: &[u64]) -> Vec<u8> {
    digests.iter().flat_map(|digest| digest.to_le_bytes()).collect()
}

/// The table's digests; the caller has checked its length.
pub(crate) fn decode_table(bytes: &[u8]) -> Vec<u64> {
    let digests = bytes.chunks_exact(DIGEST_LEN as usize);
    digests.map(|digest| u64::from_le_bytes(digest.try_into().expect("eight bytes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_start_anew_in_each_range() {
        let ranges = [RamRange { gpa: 0, len: CHUNK_SIZE + 4096 }, RamRange { gpa: 1 << 32, len: 8192 }];
        let expected = [(0, CHUNK_SIZE), (CHUNK_SIZE, 4096), (1 << 32, 8192)];
        let found: Vec<_> = chunks(&ranges).map(|chunk| (chunk.gpa, chunk.len)).collect();
        assert_eq!(found, expected);
        assert_eq!(count(&ranges), 3);
    }

    #[test]
    fn runs_leave_zero_pages_out() {
        let mut chunk = vec![0; 5 * 4096];
        assert!(data_runs(&chunk).is_empty());
        chunk[4096] = 1;
        chunk[2 * 4096 + 4095] = 1;
        chunk[4 * 4096] = 1;
        assert_eq!(data_runs(&chunk), [4096..3 * 4096, 4 * 4096..5 * 4096]);
    }

    #[test]
    fn zeroes_have_the_digest_of_zeroes() {
        for len in [4096, CHUNK_SIZE] {
            assert_eq!(zero_digest(len), digest(&vec![0; len as usize]));
        }
    }
}
