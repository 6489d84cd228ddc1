//! A snapshot that has been cut short, or of which one bit has changed.

use crate::machine::{Machine, chain};
use snapshot::{OpenError, UnverifiedSnapshot};
use snapshot_format::Image;
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A file to be damaged in place.
pub(crate) struct Victim {
    _dir: TempDir,
    path: PathBuf,
    file: File,
}

impl Victim {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.snap");
        fs::write(&path, bytes).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        Self { _dir: dir, path, file }
    }

    /// What the reader says, or `None` if it takes the file.
    pub(crate) fn complaint(&self) -> Option<String> {
        let verified = UnverifiedSnapshot::open(&self.path).unwrap().verify();
        let message = chain(&verified.err()?);
        assert!(!message.contains('\n') && message.contains("a.snap"), "{message}");
        Some(message)
    }

    pub(crate) fn put(&self, offset: usize, byte: u8) {
        self.file.write_all_at(&[byte], offset as u64).unwrap();
    }
}

/// The offset at which RAM starts: `p_offset` of the first PT_LOAD.
fn ram_start(bytes: &[u8]) -> usize {
    let at = 64 + 56 + 8;
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

#[test]
fn cut_short_at_any_length_it_is_refused() {
    let bytes = Machine::tiny().file();
    let victim = Victim::new(&bytes);
    assert_eq!(victim.complaint(), None);
    let ram_start = ram_start(&bytes);
    let in_ram =
        (ram_start..bytes.len()).filter(|len| len % 61 == 0 || len % 4096 < 2 || len + 1 == bytes.len());
    for len in (0..ram_start).chain(in_ram).rev() {
        victim.file.set_len(len as u64).unwrap();
        let message = victim.complaint().unwrap_or_else(|| panic!("taken at {len} bytes"));
        let expected = if len == 0 { "empty".to_owned() } else { format!("has {len} bytes") };
        assert!(message.contains(&expected), "{len}: {message}");
    }
}

#[test]
fn what_is_missing_is_named() {
    let bytes = Machine::small().file();
    let start = ram_start(&bytes);
    let first = start + (2 << 20) + 0x3000;
    let cases = [
        (10, "ELF header ends at byte 64"),
        (100, "program headers end at byte 232"),
        (1000, "notes end at byte 4096"),
        (first - 1, "RAM range at GPA 0x0 ends"),
        (first, "RAM range at GPA 0x100000000 ends"),
    ];
    for (len, expected) in cases {
        let message = Victim::new(&bytes[..len]).complaint().unwrap();
        assert!(message.contains(expected), "{len}: {message}");
    }
}

#[test]
fn a_longer_file_is_refused() {
    let mut bytes = Machine::tiny().file();
    bytes.push(0);
    assert!(Victim::new(&bytes).complaint().unwrap().contains("RAM ends at byte"));
}

#[test]
fn any_flipped_bit_outside_ram_is_found() {
    let bytes = Machine::tiny().file();
    let victim = Victim::new(&bytes);
    for (offset, byte) in bytes[..ram_start(&bytes)].iter().enumerate() {
        for bit in 0..8 {
            victim.put(offset, byte ^ (1 << bit));
            assert!(victim.complaint().is_some(), "bit {bit} of byte {offset}");
        }
        victim.put(offset, !byte);
        assert!(victim.complaint().is_some(), "all of byte {offset}");
        victim.put(offset, *byte);
    }
    assert_eq!(victim.complaint(), None);
}

/// What the restore stub says of the same bytes, all in memory.
#[test]
fn the_format_crate_alone_finds_any_flipped_byte() {
    let mut bytes = Machine::tiny().file();
    assert_eq!(Image::check(&bytes).unwrap().layout.ram().len(), 2);
    for offset in 0..ram_start(&bytes) {
        for flip in [1, 0x80, 0xff] {
            bytes[offset] ^= flip;
            assert!(Image::check(&bytes).is_err(), "byte {offset} ^ {flip:#x}");
            bytes[offset] ^= flip;
        }
    }
    for len in 0..bytes.len() {
        assert!(Image::check(&bytes[..len]).is_err(), "cut at {len}");
    }
}

#[test]
fn what_is_no_file_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for (path, kind) in [(dir.path(), "a directory"), (Path::new("/dev/zero"), "a device"), (&pipe, "a pipe")]
    {
        let error = UnverifiedSnapshot::open(path).unwrap_err();
        assert!(matches!(error, OpenError::NotAFile { found, .. } if found == kind), "{error}");
    }
    let missing = UnverifiedSnapshot::open(&dir.path().join("none")).unwrap_err();
    let message = chain(&missing);
    assert!(message.contains("none") && message.contains("No such file"), "{message}");
}

#[test]
fn other_files_are_told_apart() {
    let program = fs::read("/proc/self/exe").unwrap();
    let mut elf32 = program[..4096].to_vec();
    elf32[4] = 1;
    let mut arm = Machine::tiny().file();
    arm[18] = 183;
    let mut big_endian = Machine::tiny().file();
    big_endian[5] = 2;
    let cases: [(&[u8], &str); 7] = [
        (b"", "the file is empty"),
        (b"x", "not an ELF file"),
        (b"hello, this is no snapshot at all\n", "not an ELF file"),
        (&program, "e_type"),
        (&elf32, "EI_CLASS"),
        (&arm, "e_machine is 0xb7, expected 0x3e"),
        (&big_endian, "EI_DATA"),
    ];
    for (bytes, expected) in cases {
        let message = Victim::new(bytes).complaint().unwrap();
        assert!(message.contains(expected), "{message}");
    }
}
