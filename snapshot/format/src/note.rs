//! ELF notes: owner, type, descriptor.
//!
//! In: owners and descriptors, or the bytes of a PT_NOTE segment. Out: the segment, or its notes. Holds: names and
//! descriptors are padded with zeroes to 4 bytes, and the notes fill the segment exactly.

use crate::{Fault, NOTE_HEADER_LEN, number};

/// Owner of the notes that every core has; gdb looks for the NUL.
pub const CORE: &[u8] = b"CORE\0";
/// Registers of one thread (Linux `elf.h`).
pub const NT_PRSTATUS: u32 = 1;
/// Owner of what a Linux kernel tells debuggers about itself
/// (`Documentation/admin-guide/kdump/vmcoreinfo.rst`).
pub const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
/// Type of that note (Linux `kernel/vmcore_info.c`).
pub const NT_VMCOREINFO: u32 = 0;
/// Owner of this format's notes.
pub const VMMSNAP: &[u8] = b"VMMSNAP\0";
/// This format's notes: type, and name in messages. gdb looks at the type before the owner, so small numbers, which mean
/// registers to it, will not do.
pub const HEADER: (u32, &str) = (0x534e_4150, "fixed header");
/// Postcard.
pub const MANIFEST: (u32, &str) = (HEADER.0 + 1, "manifest");
/// Sections.
pub const STATE: (u32, &str) = (HEADER.0 + 2, "machine state");
/// Digests.
pub const TABLE: (u32, &str) = (HEADER.0 + 3, "chunk table");
/// A version, a tag, a longer digest of each chunk, and a CRC-32 of all that. Most snapshots have none.
pub const SEAL: (u32, &str) = (HEADER.0 + 4, "seal");

/// Bytes of a seal's descriptor for so many chunks of RAM.
pub fn seal_len(chunks: u64) -> u64 {
    4 + 32 + 32 * chunks + 4
}

/// One note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note<'a> {
    /// With its NUL.
    pub owner: &'a [u8],
    /// Its type.
    pub kind: u32,
    /// Its descriptor, without padding.
    pub desc: &'a [u8],
}

impl Note<'_> {
    /// Whether this is a note of that owner and type.
    pub fn is(&self, owner: &[u8], kind: u32) -> bool {
        self.owner == owner && self.kind == kind
    }
}

/// Bytes that a note takes, padding included.
pub fn note_len(owner: &[u8], desc_len: u64) -> u64 {
    NOTE_HEADER_LEN + (owner.len() as u64).next_multiple_of(4) + desc_len.next_multiple_of(4)
}

/// Appends a note.
pub fn push(out: &mut impl Extend<u8>, owner: &[u8], kind: u32, desc: &[u8]) {
    for number in [owner.len() as u32, desc.len() as u32, kind] {
        out.extend(number.to_le_bytes());
    }
    for part in [owner, desc] {
        out.extend(part.iter().copied());
        out.extend(core::iter::repeat_n(0, part.len().next_multiple_of(4) - part.len()));
    }
}

/// The notes of a segment, one after another. After a fault there are no more.
pub fn walk(segment: &[u8]) -> impl Iterator<Item = Result<Note<'_>, Fault>> {
    let (mut rest, mut index) = (segment, 0);
    core::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let offset = segment.len() - rest.len();
        let note = take_note(&mut rest).map_err(|problem| Fault::Note { index, offset, problem });
        index += 1;
        if note.is_err() {
            rest = &[];
        }
        Some(note)
    })
}

fn take_note<'a>(rest: &mut &'a [u8]) -> Result<Note<'a>, &'static str> {
    let header =
        take(rest, NOTE_HEADER_LEN as usize).ok_or("the segment ends in the middle of its header")?;
    let number = |at: usize| number(header, at, 4) as u32;
    let owner = take_padded(rest, number(0))?;
    if owner.is_empty() {
        return Err("it has no owner");
    }
    let desc = take_padded(rest, number(4))?;
    Ok(Note { owner, kind: number(8), desc })
}

fn take_padded<'a>(rest: &mut &'a [u8], len: u32) -> Result<&'a [u8], &'static str> {
    let bytes = take(rest, len as usize).ok_or("it goes on past the end of the notes")?;
    let padding =
        take(rest, bytes.len().next_multiple_of(4) - bytes.len()).ok_or("its padding is cut off")?;
    if padding.iter().any(|byte| *byte != 0) {
        return Err("its padding is not zero");
    }
    Ok(bytes)
}

pub(crate) fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn walks_what_it_pushes() {
        let mut bytes = Vec::new();
        push(&mut bytes, CORE, NT_PRSTATUS, &[1, 2, 3]);
        push(&mut bytes, VMMSNAP, HEADER.0, &[]);
        assert_eq!(bytes.len() as u64, note_len(CORE, 3) + note_len(VMMSNAP, 0));
        let notes: Vec<_> = walk(&bytes).map(Result::unwrap).collect();
        assert_eq!(notes[0], Note { owner: CORE, kind: NT_PRSTATUS, desc: &[1, 2, 3] });
        assert!(notes[1].is(VMMSNAP, HEADER.0) && notes[1].desc.is_empty() && notes.len() == 2);
    }

    #[test]
    fn refuses_a_note_that_claims_4_gib() {
        let mut bytes = Vec::new();
        push(&mut bytes, CORE, 1, &[0; 8]);
        bytes[4..8].fill(0xff);
        assert!(matches!(walk(&bytes).next(), Some(Err(Fault::Note { index: 0, .. }))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_notes_or_an_error(bytes: Vec<u8>) {
            assert!(walk(&bytes).count() <= bytes.len() / 12 + 1);
        }
    }
}
