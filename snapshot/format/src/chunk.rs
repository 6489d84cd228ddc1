//! Chunks of RAM and their digests.
//!
//! In: RAM ranges, bytes of chunks. Out: the chunks in table order, digests. Holds: the table has exactly one digest for
//! each chunk, and a chunk never reaches across two ranges.

use crate::{CHUNK_SIZE, PAGE_SIZE, RamRange, number};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes of one digest in the table.
pub const DIGEST_LEN: u64 = 8;

/// A page of zeroes.
pub static ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// The chunks of these ranges, in the order of the table.
pub fn chunks(ranges: &[RamRange]) -> impl Iterator<Item = RamRange> + '_ {
    ranges.iter().flat_map(|range| {
        (0..range.len.div_ceil(CHUNK_SIZE))
            .map(|index| index * CHUNK_SIZE)
            .map(|start| RamRange { gpa: range.gpa + start, len: (range.len - start).min(CHUNK_SIZE) })
    })
}

/// Number of chunks in these ranges.
pub fn count(ranges: &[RamRange]) -> u64 {
    ranges.iter().map(|range| range.len.div_ceil(CHUNK_SIZE)).sum()
}

/// XXH3, 64 bits, seed 0.
pub fn digest(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// A digest of bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Digest(Xxh3);

impl Digest {
    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Takes a page of zeroes.
    pub fn update_zero_page(&mut self) {
        self.0.update(&ZERO_PAGE);
    }

    /// The same as [`digest`] of all pieces.
    pub fn value(&self) -> u64 {
        self.0.digest()
    }
}

/// The digest of so many bytes of zeroes, whole pages.
pub fn zero_digest(len: u64) -> u64 {
    let mut digest = Digest::default();
    (0..len / PAGE_SIZE).for_each(|_| digest.update_zero_page());
    digest.value()
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // By words, which compilers put together to vectors.
    let (words, rest) = bytes.as_chunks::<8>();
    let is_zero = |block: &[[u8; 8]]| block.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)) == 0;
    let (blocks, words) = words.as_chunks::<32>();
    blocks.iter().all(|block| is_zero(block)) && is_zero(words) && rest.iter().all(|byte| *byte == 0)
}

/// The digests of a table; the caller has checked its length.
pub fn digests(table: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    table.chunks_exact(DIGEST_LEN as usize).map(|bytes| number(bytes, 0, 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    #[test]
    fn chunks_start_anew_in_each_range() {
        let ranges = [RamRange { gpa: 0, len: CHUNK_SIZE + 4096 }, RamRange { gpa: 1 << 32, len: 8192 }];
        let expected = [(0, CHUNK_SIZE), (CHUNK_SIZE, 4096), (1 << 32, 8192)];
        let found: Vec<_> = chunks(&ranges).map(|chunk| (chunk.gpa, chunk.len)).collect();
        assert_eq!(found, expected);
        assert_eq!(count(&ranges), 3);
    }

    #[test]
    fn zeroes_have_the_digest_of_zeroes() {
        for len in [4096, CHUNK_SIZE] {
            assert_eq!(zero_digest(len), digest(&vec![0; len as usize]));
        }
    }

    #[test]
    fn pieces_have_the_digest_of_the_whole() {
        let whole: Vec<u8> = (0..5 * 4096u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        let mut pieces = Digest::default();
        whole.chunks(4096).for_each(|piece| pieces.update(piece));
        assert_eq!(pieces.value(), digest(&whole));
    }

    #[test]
    fn one_bit_makes_a_page_of_data() {
        let mut page = [0; 4096];
        assert!(is_zero(&page));
        for at in [0, 63, 64, 255, 256, 4095] {
            page[at] = 0x10;
            assert!(!is_zero(&page));
            assert!(!is_zero(&page[..=at]) && is_zero(&page[..at]));
            page[at] = 0;
        }
    }
}
