//! The ELF header and the program headers, byte for byte.
//!
//! In: program headers, or a file's first bytes. Out: those bytes, or the program headers. Holds: the ELF header has
//! one free field, the number of program headers, and that is bounded.

use crate::{EHDR_LEN, PHDR_LEN, RAM_RANGES_MAX, fault::Fault};

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
pub(crate) const PT_LOAD: u32 = 1;
/// The notes.
pub(crate) const PT_NOTE: u32 = 4;

/// A program header (ELF-64 object file format, figure 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProgramHeader {
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) vaddr: u64,
    pub(crate) paddr: u64,
    pub(crate) filesz: u64,
    pub(crate) memsz: u64,
    pub(crate) align: u64,
}

impl ProgramHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = [self.kind.to_le_bytes(), self.flags.to_le_bytes()].concat();
        for number in [self.offset, self.vaddr, self.paddr, self.filesz, self.memsz, self.align] {
            out.extend(number.to_le_bytes());
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

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// An ELF header and these program headers.
pub(crate) fn encode(headers: &[ProgramHeader]) -> Vec<u8> {
    let mut out = vec![0; EHDR_LEN as usize];
    out[..4].copy_from_slice(ELF_MAGIC);
    for (_, at, width, value) in EHDR_FIELDS {
        out[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
    out[E_PHNUM..E_PHNUM + 2].copy_from_slice(&(headers.len() as u16).to_le_bytes());
    headers.iter().for_each(|header| out.extend(header.encode()));
    out
}

/// The program headers of a file that starts with `head`: its first [`crate::HEADERS_MAX`] bytes, or all of them if
/// there are fewer.
pub(crate) fn decode(head: &[u8]) -> Result<Vec<ProgramHeader>, Fault> {
    check_magic(head)?;
    require("the ELF header", EHDR_LEN, head)?;
    for (field, at, width, value) in EHDR_FIELDS {
        expect("ELF header", field, number(head, at, width), &[value])?;
    }
    let count = number(head, E_PHNUM, 2);
    if !(2..=1 + RAM_RANGES_MAX as u64).contains(&count) {
        let expected = format!("2 to {}", 1 + RAM_RANGES_MAX);
        return Err(Fault::Field { what: "ELF header".to_owned(), field: "e_phnum", found: count, expected });
    }
    let end = EHDR_LEN + count * PHDR_LEN;
    require("the program headers", end, head)?;
    let headers = head[EHDR_LEN as usize..end as usize].chunks_exact(PHDR_LEN as usize);
    Ok(headers.map(ProgramHeader::decode).collect())
}

fn check_magic(head: &[u8]) -> Result<(), Fault> {
    let found = &head[..head.len().min(ELF_MAGIC.len())];
    match found {
        [] => Err(Fault::Empty),
        _ if ELF_MAGIC.starts_with(found) => Ok(()),
        _ => Err(Fault::NotElf { found: found.to_vec() }),
    }
}

fn require(what: &str, end: u64, head: &[u8]) -> Result<(), Fault> {
    let len = head.len() as u64;
    if end <= len {
        return Ok(());
    }
    Err(Fault::Truncated { what: what.to_owned(), end, len })
}

/// Refuses a field that has none of the allowed values.
pub(crate) fn expect(what: &str, field: &'static str, found: u64, allowed: &[u64]) -> Result<(), Fault> {
    if allowed.contains(&found) {
        return Ok(());
    }
    let expected = allowed.iter().map(|value| format!("{value:#x}")).collect::<Vec<_>>().join(" or ");
    Err(Fault::Field { what: what.to_owned(), field, found, expected })
}
