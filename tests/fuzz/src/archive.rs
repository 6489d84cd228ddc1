//! Any bytes as an archive: what comes out is a snapshot, whole, and the one that is in there; or nothing does.

#![no_main]

#[path = "common.rs"]
mod common;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::io::Read;
use std::path::PathBuf;
use std::sync::LazyLock;
use vmm::{archive, signals};

/// As much as the reader of an archive may write here, and as is taken out of one to be changed, in bytes.
const MOST: u64 = 16 << 20;

static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    // A few bytes stand for any number of others.
    signals::let_long_writes_fail();
    setrlimit(Resource::Fsize, Rlimit { current: Some(MOST), maximum: Some(MOST) }).unwrap();
    tempfile::tempdir_in("/dev/shm").unwrap()
});

/// What is in there, as far as it goes.
fn content(archive: &[u8], most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(decoder) = zstd::stream::read::Decoder::with_buffer(archive) {
        let _ = decoder.take(most).read_to_end(&mut bytes);
    }
    bytes
}

/// An archive of one frame or of many, with checksums or without.
fn compressed(bytes: &[u8], seed: u32) -> Vec<u8> {
    let frame = if seed & 16 == 0 { bytes.len() } else { bytes.len() / 7 }.max(1);
    let one = |part: &[u8]| {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_checksum(seed & 32 == 0).unwrap();
        std::io::copy(&mut &part[..], &mut encoder).unwrap();
        encoder.finish().unwrap()
    };
    bytes.chunks(frame).flat_map(one).collect()
}

// One of four is changed as it is; in the others what they hold is changed, made right again, and compressed anew.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 4 == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut inside = content(&data[..size], 1 << 16);
    let len = inside.len();
    inside.resize(1 << 16, 0);
    let most = inside.len();
    let len = fuzzer_mutate(&mut inside, len, most);
    common::seal(&mut inside[..len]);
    let archive = compressed(&inside[..len], seed);
    if archive.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..archive.len()].copy_from_slice(&archive);
    archive.len()
});

fuzz_target!(|data: &[u8]| {
    let [packed, new, again, twin] = ["packed", "new", "again", "twin"].map(|name| DIR.path().join(name));
    std::fs::write(&packed, data).unwrap();
    let read = |path: &PathBuf| std::fs::read(path).unwrap();
    match archive::unpack(&packed, &new, None) {
        Err(_) => assert!(!new.exists(), "it is refused, and something is there"),
        Ok(_) => {
            let whole = read(&new);
            assert_eq!(whole, content(data, MOST), "another file than what is in the archive");
            archive::pack(&new, &again).unwrap();
            archive::unpack(&again, &twin, None).unwrap();
            assert_eq!(whole, read(&twin));
            [new, again, twin].iter().for_each(|path| std::fs::remove_file(path).unwrap());
        }
    }
});
