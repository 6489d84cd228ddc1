//! The fixed parts of the snapshot file: ELF headers, notes, the fixed header, the manifest's outline, chunks of RAM.
//!
//! In: bytes of a file. Out: where its parts lie, each checked against the lengths and CRCs that cover it, or a [`Fault`].
//! Holds: nothing is allocated and nothing of an operating system is used, so that the host's reader and the restore stub,
//! which runs as a guest, are the same code; no bytes, however hostile, cause a panic.
//!
//! The format is drawn at the top of the `snapshot` crate, which writes it and reads the rest.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod crc;
mod fault;
pub mod note;
pub mod elf;
pub mod header;
pub mod layout;
pub mod outline;
pub mod chunk;
pub mod image;

pub use fault::{Expected, Fault, Part, ShortText};
pub use image::{Image, Notes};
pub use layout::{Layout, MappedRange, Origin};

/// The format's version; a reader takes its own version only.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes in a page: the alignment of RAM in the file, and the size of the smallest hole.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of RAM under one digest; the last chunk of a range may be shorter.
pub const CHUNK_SIZE: u64 = 1 << 20;
/// The digest's name in the manifest.
pub const DIGEST: &str = "xxh3-64";
/// All notes together are shorter than this: Linux reads those of a `/proc/vmcore` into one `kmalloc`, of which 4 MiB is
/// the largest; and it bounds what a reader allocates.
pub const NOTES_MAX: u64 = 4 << 20;
/// Most RAM ranges of a machine.
pub const RAM_RANGES_MAX: usize = 64;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u32 = 1024;
/// Guest physical addresses end here (52 bits: AMD64 Architecture Programmer's Manual, volume 2, 5.1).
pub const GPA_END: u64 = 1 << 52;

/// Bytes of the ELF header (ELF-64 object file format, figure 2).
pub const EHDR_LEN: u64 = 64;
/// Bytes of a program header (ELF-64 object file format, figure 6).
pub const PHDR_LEN: u64 = 56;
/// Bytes of a note's header: the lengths of name and descriptor, and the type.
pub const NOTE_HEADER_LEN: u64 = 12;
/// Bytes of the longest ELF header with program headers.
pub const HEADERS_MAX: u64 = EHDR_LEN + (1 + RAM_RANGES_MAX as u64) * PHDR_LEN;
/// Bytes of `struct elf_prstatus` (Linux `include/linux/elfcore.h`).
pub const PRSTATUS_LEN: u64 = 336;

// The reader tells the two layouts apart by where the notes start: right after the headers, or at the next page.
const _: () = assert!(HEADERS_MAX < PAGE_SIZE);
const _: () = assert!(CHUNK_SIZE.is_multiple_of(PAGE_SIZE));

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RamRange {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The little-endian number of `width` bytes, at most 8, at `at`; the caller has checked that it is there.
pub(crate) fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
