//! The ELF header and the program headers, byte for byte.
//!
//! In: program headers, or a file's first bytes. Out: those bytes, or the program headers. Holds: the ELF header has
//! one free field, the number of program headers, and that is bounded.

use crate::{EHDR_LEN, Expected, Fault, PHDR_LEN, Part, RAM_RANGES_MAX, number};

const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
/// Offset of `e_phnum`, the one field of the ELF header that varies.
const E_PHNUM: usize = 56;
/// The others: name, offset, bytes, value (ELF-64 object file format, figure 2).
const EHDR_FIELDS: [(&str, usize, usize, u64); 17] = [
    ("EI_CLASS", 4, 1, 2),
    ("EI_DATA", 5, 1, 1),
    ("EI_VERSION", 6, 1, 1),
    ("e_type", 16, 2, 4),
    ("e_machine", 18, 2, 62),
    ("EI_OSABI", 7, 1, 0),
    ("EI_PAD", 8, 8, 0),
    ("e_version", 20, 4, 1),
    ("e_entry", 24, 8, 0),
    ("e_phoff", 32, 8, EHDR_LEN),
    ("e_shoff", 40, 8, 0),
    ("e_flags", 48, 4, 0),
    ("e_ehsize", 52, 2, EHDR_LEN),
    ("e_phentsize", 54, 2, PHDR_LEN),
    ("e_shentsize", 58, 2, 0),
    ("e_shnum", 60, 2, 0),
    ("e_shstrndx", 62, 2, 0),
];

/// A segment of RAM.
pub const PT_LOAD: u32 = 1;
/// The notes.
pub const PT_NOTE: u32 = 4;
/// Changed pages of RAM, one behind the other: a type of our own, between PT_LOOS (0x6000_0000) and PT_HIOS, with "SNA" in it. Debuggers pass over
/// what they don't know.
pub const PT_PACKED: u32 = 0x6053_4e41;

/// A program header (ELF-64 object file format, figure 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the field of that name, `kind` being `p_type`")]
pub struct ProgramHeader {
    pub kind: u32,
    pub flags: u32,
    pub offset: u64,
    pub vaddr: u64,
    pub paddr: u64,
    pub filesz: u64,
    pub memsz: u64,
    pub align: u64,
}

impl ProgramHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; PHDR_LEN as usize] {
        let mut out = [0; PHDR_LEN as usize];
        out[..4].copy_from_slice(&self.kind.to_le_bytes());
        out[4..8].copy_from_slice(&self.flags.to_le_bytes());
        let numbers = [self.offset, self.vaddr, self.paddr, self.filesz, self.memsz, self.align];
        for (place, number) in out[8..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Self {
        let [kind, flags] = [0, 4].map(|at| number(bytes, at, 4) as u32);
        let [offset, vaddr, paddr, filesz, memsz, align] =
            [8, 16, 24, 32, 40, 48].map(|at| number(bytes, at, 8));
        Self { kind, flags, offset, vaddr, paddr, filesz, memsz, align }
    }
}

/// The program headers of a file: two at least, and at most one more than there can be RAM ranges.
#[derive(Clone, Copy, Debug)]
pub struct ProgramHeaders<'a>(&'a [u8]);

impl<'a> ProgramHeaders<'a> {
    /// In their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ProgramHeader> + Clone + use<'a> {
        self.0.chunks_exact(PHDR_LEN as usize).map(ProgramHeader::decode)
    }

    /// End of the program headers in the file.
    pub fn end(&self) -> u64 {
        EHDR_LEN + self.0.len() as u64
    }
}

/// An ELF header before so many program headers.
pub fn encode_header(count: u16) -> [u8; EHDR_LEN as usize] {
    let mut out = [0; EHDR_LEN as usize];
    out[..4].copy_from_slice(ELF_MAGIC);
    for (_, at, width, value) in EHDR_FIELDS {
        out[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
    out[E_PHNUM..E_PHNUM + 2].copy_from_slice(&count.to_le_bytes());
    out
}

/// The program headers of a file that starts with `head`: its first [`crate::HEADERS_MAX`] bytes or more, or all of them
/// if there are fewer.
///
/// # Errors
/// A header that is cut off, or a field of the ELF header that no snapshot has.
pub fn decode(head: &[u8]) -> Result<ProgramHeaders<'_>, Fault> {
    check_magic(head)?;
    require(Part::ElfHeader, EHDR_LEN, head)?;
    for (field, at, width, value) in EHDR_FIELDS {
        expect(Part::ElfHeader, field, number(head, at, width), Expected::One(value))?;
    }
    let count = number(head, E_PHNUM, 2);
    expect(Part::ElfHeader, "e_phnum", count, Expected::Between(2, 1 + RAM_RANGES_MAX as u64))?;
    let end = EHDR_LEN + count * PHDR_LEN;
    require(Part::ProgramHeaders, end, head)?;
    Ok(ProgramHeaders(&head[EHDR_LEN as usize..end as usize]))
}

fn check_magic(head: &[u8]) -> Result<(), Fault> {
    let found = &head[..head.len().min(ELF_MAGIC.len())];
    match found {
        [] => Err(Fault::Empty),
        _ if ELF_MAGIC.starts_with(found) => Ok(()),
        _ => {
            let mut bytes = [0; 4];
            bytes[..found.len()].copy_from_slice(found);
            Err(Fault::NotElf { found: bytes, len: found.len() })
        }
    }
}

fn require(what: Part, end: u64, head: &[u8]) -> Result<(), Fault> {
    let len = head.len() as u64;
    if end <= len { Ok(()) } else { Err(Fault::Truncated { what, end, len }) }
}

/// Refuses a field that has none of the values allowed.
pub(crate) fn expect(what: Part, field: &'static str, found: u64, expected: Expected) -> Result<(), Fault> {
    let allowed = match expected {
        Expected::One(value) => found == value,
        Expected::Either(one, other) => found == one || found == other,
        Expected::Between(low, high) => (low..=high).contains(&found),
        Expected::Pages(low, high) => (low..=high).contains(&found) && found.is_multiple_of(crate::PAGE_SIZE),
    };
    if allowed { Ok(()) } else { Err(Fault::Field { what, field, found, expected }) }
}
