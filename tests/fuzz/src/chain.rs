//! Two files that may be a difference and its parent: a chain, or a line that says why not.

#![no_main]

#[path = "common.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use snapshot::Chain;
use std::sync::LazyLock;

static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir_in("/dev/shm").unwrap());

common::mutate_and!(common::seal_both);

fuzz_target!(|data: &[u8]| {
    let (top, parent) = common::split(data);
    let path = DIR.path().join("top");
    std::fs::write(&path, top).unwrap();
    std::fs::write(DIR.path().join("parent"), parent).unwrap();
    let Ok(chain) = Chain::open(&path) else { return };
    let _ = chain.verify_ram(&mut |_, _| ());
    // Every byte of RAM comes from one place in one file that has it.
    let pieces = chain.pieces();
    let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
    assert_eq!(bytes, chain.top().manifest().ram.bytes);
    for piece in &pieces {
        assert!(piece.offset + piece.len <= chain.links()[piece.link].file_len());
    }
});
