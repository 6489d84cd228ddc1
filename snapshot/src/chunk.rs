//! What a writer needs of chunks of RAM besides their digests.
//!
//! In: bytes of chunks, digests. Out: runs of pages worth writing, the chunk table. Holds: a page that is not written is
//! all zero.

use crate::{CHUNK_SIZE, PAGE_SIZE};
use snapshot_format::chunk::{self, is_zero};
pub(crate) use snapshot_format::chunk::{DIGEST_LEN, Digest, chunks, count, digest, digests};
use std::{ops::Range, sync::LazyLock};

/// The digest of a whole chunk of zeroes. Made of one page: a chunk of them would be a fifth of all the memory that a monitor has.
static ZERO_DIGEST: LazyLock<u64> = LazyLock::new(|| chunk::zero_digest(CHUNK_SIZE));

/// The digest of `len` zeroes, whole pages, at most a chunk.
pub(crate) fn zero_digest(len: u64) -> u64 {
    if len == CHUNK_SIZE { *ZERO_DIGEST } else { chunk::zero_digest(len) }
}

/// The longest runs of pages that are not all zero, as byte ranges of `chunk`.
pub(crate) fn data_runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in chunk.chunks(PAGE_SIZE as usize).enumerate() {
        let start = index * PAGE_SIZE as usize;
        if is_zero(page) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
