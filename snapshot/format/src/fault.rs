//! What can be wrong with the bytes of a snapshot.
//!
//! In: what a check found. Out: one line that names the thing and says what was expected. Holds: it owns what it says and
//! allocates nothing, so that the stub can say it too.

use crate::{FORMAT_VERSION, PAGE_SIZE};
use core::fmt;

/// The part of the file that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The ELF header.
    ElfHeader,
    /// All program headers.
    ProgramHeaders,
    /// A program header of unknown kind.
    ProgramHeader(usize),
    /// A program header that places notes.
    NoteSegment(usize),
    /// A program header that places RAM.
    LoadSegment(usize),
    /// A program header that places changed pages.
    PackedSegment(usize),
    /// All notes.
    Notes,
    /// A note, or a part of the manifest.
    Named(&'static str),
    /// A section of the machine state.
    Section(ShortText),
    /// The RAM range at this guest physical address.
    Ram(u64),
    /// RAM of an incremental snapshot.
    Packed,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ElfHeader => f.write_str("ELF header"),
            Self::ProgramHeaders => f.write_str("program headers"),
            Self::ProgramHeader(index) => write!(f, "program header {index}"),
            Self::NoteSegment(index) => write!(f, "program header {index} (PT_NOTE)"),
            Self::LoadSegment(index) => write!(f, "program header {index} (PT_LOAD)"),
            Self::PackedSegment(index) => write!(f, "program header {index} (changed pages)"),
            Self::Notes => f.write_str("notes"),
            Self::Named(name) => f.write_str(name),
            Self::Section(name) => write!(f, "section {name}"),
            Self::Ram(gpa) => write!(f, "RAM range at GPA {gpa:#x}"),
            Self::Packed => f.write_str("part with the changed pages"),
        }
    }
}

/// The first bytes of a text that came from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortText {
    bytes: [u8; 32],
    len: u8,
}

impl ShortText {
    /// As much of the text as there is room for.
    pub fn of(text: &str) -> Self {
        let mut len = text.len().min(32);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        let mut bytes = [0; 32];
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Self { bytes, len: len as u8 }
    }
}

/// Control characters are not shown: they could rewrite what a terminal shows.
impl fmt::Display for ShortText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = core::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default();
        text.chars().try_for_each(|c| fmt::Write::write_char(f, if c.is_control() { '?' } else { c }))
    }
}

/// What a number should have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// This.
    One(u64),
    /// One of these.
    Either(u64, u64),
    /// From the one to the other.
    Between(u64, u64),
    /// From the one to the other, and whole pages.
    Pages(u64, u64),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(value) => write!(f, "{value:#x}"),
            Self::Either(one, other) => write!(f, "{one:#x} or {other:#x}"),
            Self::Between(low, high) => write!(f, "{low:#x} to {high:#x}"),
            Self::Pages(low, high) => write!(f, "a multiple of {PAGE_SIZE:#x} from {low:#x} to {high:#x}"),
        }
    }
}

/// What is wrong with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The file has no bytes.
    Empty,
    /// The file starts with something else.
    NotElf {
        /// Its first bytes.
        found: [u8; 4],
        /// How many of them there are.
        len: usize,
    },
    /// The file is shorter than its headers say.
    Truncated {
        /// The first part that is not there in full.
        what: Part,
        /// One past its last byte.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// The file goes on where it should end.
    TooLong {
        /// Where it should end.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// A number in a header is not what it has to be.
    Field {
        /// The header.
        what: Part,
        /// The field, by its name in the specification.
        field: &'static str,
        /// The value in the file.
        found: u64,
        /// The values allowed.
        expected: Expected,
    },
    /// A note is malformed.
    Note {
        /// Counted from 0.
        index: usize,
        /// Of the note's header, from the start of the notes.
        offset: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// A note is absent, or there twice.
    NoteCount {
        /// The note.
        what: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A snapshot of our own layout has a note out of place.
    NoteOrder {
        /// Counted from 0.
        index: usize,
        /// What should be there.
        expected: &'static str,
    },
    /// The file is of another version.
    Version {
        /// The version in the file.
        found: u32,
    },
    /// A part's length is not the one recorded.
    Length {
        /// The part.
        what: Part,
        /// Its length in the file.
        found: u64,
        /// The length it should have.
        expected: u64,
    },
    /// A part's CRC is not the one recorded.
    Checksum {
        /// The part.
        what: Part,
        /// Of the bytes in the file.
        found: u32,
        /// As recorded.
        expected: u32,
    },
    /// A byte that has to be zero is not.
    Padding {
        /// In the file.
        offset: u64,
        /// The byte.
        found: u8,
    },
    /// The manifest ends too early, or holds no text where one should be.
    Manifest {
        /// Where in it.
        offset: usize,
    },
    /// The manifest goes on after its end.
    ManifestTooLong {
        /// Bytes left over.
        left: usize,
    },
    /// The program headers and the manifest disagree.
    Ranges {
        /// Start of the first range that only one of them has.
        gpa: u64,
    },
    /// The file holds only changed pages, and does not say since when.
    NoParent,
    /// The file holds only what changed since another.
    Incremental {
        /// The parent's generation id.
        parent: [u8; 16],
    },
    /// A chunk of RAM differs from its digest.
    Digest {
        /// Start of the chunk.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// Of the bytes in the file.
        found: u64,
        /// As recorded.
        expected: u64,
    },
}

/// How a Zstandard frame starts (RFC 8878, section 3.1.1).
const ZSTANDARD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Empty => f.write_str("the file is empty"),
            Self::NotElf { found: ZSTANDARD, .. } => {
                f.write_str("a Zstandard file: `vmm unpack` makes a snapshot of what `vmm pack` wrote")
            }
            Self::NotElf { found, len } => {
                let found = &found[..len.min(4)];
                write!(f, "not an ELF file: it starts with {found:02x?}, expected [7f, 45, 4c, 46]")
            }
            Self::Truncated { what, end, len } => {
                let verb = if matches!(what, Part::Notes | Part::ProgramHeaders) { "end" } else { "ends" };
                write!(f, "truncated: the {what} {verb} at byte {end}, but the file has {len} bytes")
            }
            Self::TooLong { end, len } => {
                write!(f, "RAM ends at byte {end}, but the file has {len} bytes")
            }
            Self::Field { what, field, found, expected } => {
                write!(f, "{what}: {field} is {found:#x}, expected {expected}")
            }
            Self::Note { index, offset, problem } => {
                write!(f, "note {index}, {offset} bytes into the notes: {problem}")
            }
            Self::NoteCount { what, found } => {
                write!(f, "expected exactly one {what} note (owner VMMSNAP), found {found}")
            }
            Self::NoteOrder { index, expected } => {
                write!(f, "note {index} is not the {expected} note that belongs there")
            }
            Self::Version { found } => {
                write!(f, "format version {found}; this program reads version {FORMAT_VERSION}")
            }
            Self::Length { what, found, expected } => {
                write!(f, "{what}: {found} bytes long, expected {expected}")
            }
            Self::Checksum { what, found, expected } => {
                write!(f, "{what}: CRC-32 is {found:08x}, expected {expected:08x}")
            }
            Self::Padding { offset, found } => {
                write!(f, "byte {offset} is {found:#04x}, expected zero padding")
            }
            Self::Manifest { offset } => write!(f, "the manifest does not decode at its byte {offset}"),
            Self::ManifestTooLong { left } => write!(f, "the manifest has {left} bytes after its end"),
            Self::Ranges { gpa } => {
                write!(f, "the RAM ranges of the program headers and of the manifest differ at GPA {gpa:#x}")
            }
            Self::NoParent => f.write_str("it holds changed pages only, and its manifest names no parent"),
            Self::Incremental { parent } => {
                let parent = u128::from_be_bytes(parent);
                write!(f, "an incremental snapshot: it needs its parent {parent:032x}")?;
                f.write_str(", and here only a full one will do (vmm flatten makes one)")
            }
            Self::Digest { gpa, len, found, expected } => write!(
                f,
                "the RAM chunk at GPA {gpa:#x} ({len} bytes) has digest {found:016x}, expected {expected:016x}"
            ),
        }
    }
}

impl core::error::Error for Fault {}
