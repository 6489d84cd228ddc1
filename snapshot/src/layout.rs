//! Where notes and RAM lie in a file, in the two layouts a snapshot can have.
//!
//! In: RAM ranges and the length of the notes, or a file's program headers. Out: those headers, or the places. Holds:
//! each layout leaves one place for everything, notes and RAM follow one another, and no number from a file is added
//! to before it is bounded.

use crate::{
    EHDR_LEN, NOTE_HEADER_LEN, NOTES_MAX, PAGE_SIZE, PHDR_LEN, RamRange,
    elf::{self, PT_LOAD, PT_NOTE, ProgramHeader, expect},
    fault::Fault,
};
use std::ops::Range;

/// Read, write, execute.
const RWX: u32 = 7;
/// Where x86-64 Linux maps all RAM when it is not randomised (`Documentation/arch/x86/x86_64/mm.rst`).
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// RAM segments are longer than no address space (52 bits of physical address).
const SEGMENT_MAX: u64 = 1 << 52;

/// A RAM range and its place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// In the guest.
    pub range: RamRange,
    /// Of its first byte in the file, a multiple of the page size.
    pub offset: u64,
}

/// Who laid a file out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// This crate's writer: notes right after the headers, nothing left to choose.
    Writer,
    /// Linux, as `/proc/vmcore`: notes at the next page, with others among them.
    Vmcore,
}

/// Where everything is in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) origin: Origin,
    /// End of the program headers.
    pub(crate) headers_end: u64,
    pub(crate) notes: Range<u64>,
    /// In the order of the program headers, which is also the order in the file.
    pub(crate) ram: Vec<MappedRange>,
}

impl Layout {
    /// The layout of a file to be written. The caller has checked the ranges and the notes' length.
    pub(crate) fn plan(ranges: &[RamRange], notes_len: u64) -> Self {
        let headers_end = EHDR_LEN + (1 + ranges.len() as u64) * PHDR_LEN;
        let notes = headers_end..headers_end + notes_len;
        let mut layout = Self { origin: Origin::Writer, headers_end, notes, ram: Vec::new() };
        for range in ranges {
            let offset = layout.end();
            layout.ram.push(MappedRange { range: *range, offset });
        }
        layout
    }

    /// The ELF header and program headers of a planned file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut headers = vec![note_header(&self.notes)];
        headers.extend(self.ram.iter().map(load_header));
        elf::encode(&headers)
    }

    /// The layout that these program headers describe; of the file's length nothing is known yet.
    pub(crate) fn decode(headers: &[ProgramHeader]) -> Result<Self, Fault> {
        let headers_end = EHDR_LEN + headers.len() as u64 * PHDR_LEN;
        let note_at = find_notes(headers)?;
        let (origin, notes) = check_note(note_at, &headers[note_at], headers_end)?;
        if origin == Origin::Writer {
            expect("ELF header", "index of PT_NOTE", note_at as u64, &[0])?;
        }
        let mut layout = Self { origin, headers_end, notes, ram: Vec::new() };
        for (index, header) in headers.iter().enumerate().filter(|(index, _)| *index != note_at) {
            let mapped = layout.check_load(index, header)?;
            layout.ram.push(mapped);
        }
        Ok(layout)
    }

    /// Where RAM starts in the file.
    pub(crate) fn ram_start(&self) -> u64 {
        let end = match self.origin {
            Origin::Writer => self.notes.end + NOTE_HEADER_LEN,
            Origin::Vmcore => self.notes.end,
        };
        end.next_multiple_of(PAGE_SIZE)
    }

    /// Where the last RAM range so far ends, and at last the file.
    pub(crate) fn end(&self) -> u64 {
        self.ram.last().map_or(self.ram_start(), |last| last.offset + last.range.len)
    }

    /// RAM in the order of guest addresses.
    pub(crate) fn ram_by_gpa(&self) -> Vec<MappedRange> {
        let mut ram = self.ram.clone();
        ram.sort_by_key(|mapped| mapped.range.gpa);
        ram
    }

    /// Checks the next PT_LOAD. Linux copies flags, addresses and alignment from the program headers that it was given
    /// and may have been given direct-map addresses.
    fn check_load(&self, index: usize, header: &ProgramHeader) -> Result<MappedRange, Fault> {
        let what = format!("program header {index} (PT_LOAD)");
        let (aligns, maps): (&[u64], &[u64]) = match self.origin {
            Origin::Writer => (&[PAGE_SIZE], &[0]),
            Origin::Vmcore => (&[0, PAGE_SIZE], &[0, DIRECT_MAP]),
        };
        expect(&what, "p_flags", header.flags.into(), &[RWX.into()])?;
        expect(&what, "p_align", header.align, aligns)?;
        expect(&what, "p_memsz", header.memsz, &[header.filesz])?;
        expect_pages(&what, "p_filesz", header.filesz, PAGE_SIZE)?;
        expect_pages(&what, "p_paddr", header.paddr, 0)?;
        expect(
            &what,
            "p_vaddr",
            header.vaddr,
            &maps.iter().map(|map| header.paddr.wrapping_add(*map)).collect::<Vec<_>>(),
        )?;
        expect(&what, "p_offset", header.offset, &[self.end()])?;
        let range = RamRange { gpa: header.paddr, len: header.filesz };
        Ok(MappedRange { range, offset: header.offset })
    }
}

fn note_header(notes: &Range<u64>) -> ProgramHeader {
    let len = notes.end - notes.start;
    ProgramHeader {
        kind: PT_NOTE,
        flags: 0,
        offset: notes.start,
        vaddr: 0,
        paddr: 0,
        filesz: len,
        memsz: len,
        align: 4,
    }
}

/// `p_vaddr` is the physical address, so that gdb reads memory of a guest that maps its own one to one.
fn load_header(mapped: &MappedRange) -> ProgramHeader {
    let MappedRange { range: RamRange { gpa, len }, offset } = *mapped;
    ProgramHeader {
        kind: PT_LOAD,
        flags: RWX,
        offset,
        vaddr: gpa,
        paddr: gpa,
        filesz: len,
        memsz: len,
        align: PAGE_SIZE,
    }
}

/// The index of the one PT_NOTE; all others have to be PT_LOAD.
fn find_notes(headers: &[ProgramHeader]) -> Result<usize, Fault> {
    let notes = headers.iter().position(|header| header.kind == PT_NOTE).unwrap_or(0);
    for (index, header) in headers.iter().enumerate() {
        let kind = if index == notes { PT_NOTE } else { PT_LOAD };
        expect(&format!("program header {index}"), "p_type", header.kind.into(), &[kind.into()])?;
    }
    Ok(notes)
}

/// Checks PT_NOTE. Linux left `p_align` at 0 for a long time and sets it to 4 in newer versions.
fn check_note(index: usize, header: &ProgramHeader, headers_end: u64) -> Result<(Origin, Range<u64>), Fault> {
    let what = format!("program header {index} (PT_NOTE)");
    let page = headers_end.next_multiple_of(PAGE_SIZE);
    expect(&what, "p_offset", header.offset, &[headers_end, page])?;
    let (origin, aligns): (Origin, &[u64]) =
        if header.offset == page { (Origin::Vmcore, &[0, 4]) } else { (Origin::Writer, &[4]) };
    expect(&what, "p_flags", header.flags.into(), &[0])?;
    expect(&what, "p_vaddr", header.vaddr, &[0])?;
    expect(&what, "p_paddr", header.paddr, &[0])?;
    expect(&what, "p_align", header.align, aligns)?;
    expect(&what, "p_memsz", header.memsz, &[header.filesz])?;
    if !(1..NOTES_MAX).contains(&header.filesz) {
        let expected = format!("1 to {:#x}", NOTES_MAX - 1);
        return Err(Fault::Field { what, field: "p_filesz", found: header.filesz, expected });
    }
    Ok((origin, header.offset..header.offset + header.filesz))
}

/// Refuses what is no multiple of a page, below `min`, or longer than any machine's RAM. With at most 64 segments, sums
/// of such numbers cannot overflow.
fn expect_pages(what: &str, field: &'static str, found: u64, min: u64) -> Result<(), Fault> {
    if found.is_multiple_of(PAGE_SIZE) && (min..=SEGMENT_MAX).contains(&found) {
        return Ok(());
    }
    let expected = format!("a multiple of {PAGE_SIZE:#x} from {min:#x} to {SEGMENT_MAX:#x}");
    Err(Fault::Field { what: what.to_owned(), field, found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_what_it_plans() {
        let ranges = [RamRange { gpa: 0, len: 8192 }, RamRange { gpa: 1 << 32, len: 4096 }];
        let plan = Layout::plan(&ranges, 1000);
        assert_eq!(plan.ram[0].offset, 4096);
        assert_eq!(plan.end(), 4096 + 8192 + 4096);
        let headers = elf::decode(&plan.encode()).unwrap();
        assert_eq!(Layout::decode(&headers).unwrap(), plan);
    }

    #[test]
    fn leaves_room_for_the_zeroed_note_header() {
        let ranges = [RamRange { gpa: 0, len: 4096 }];
        let headers_end = EHDR_LEN + 2 * PHDR_LEN;
        assert_eq!(Layout::plan(&ranges, 4096 - headers_end - 12).ram_start(), 4096);
        assert_eq!(Layout::plan(&ranges, 4096 - headers_end - 8).ram_start(), 8192);
    }

    #[test]
    fn refuses_any_flipped_bit() {
        let plan =
            Layout::plan(&[RamRange { gpa: 0, len: 8192 }, RamRange { gpa: 1 << 32, len: 4096 }], 1000);
        let good = plan.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let found = elf::decode(&bad).and_then(|headers| Layout::decode(&headers));
            assert!(found.is_err(), "bit {bit}: {found:?}");
        }
    }

    #[test]
    fn the_last_address_and_the_direct_map_do_not_overflow() {
        let plan = Layout::plan(&[RamRange { gpa: SEGMENT_MAX, len: 4096 }], 1000);
        let mut headers = elf::decode(&plan.encode()).unwrap();
        headers[0].offset = PAGE_SIZE;
        headers[1].offset = 2 * PAGE_SIZE;
        headers[1].vaddr = DIRECT_MAP;
        assert!(Layout::decode(&headers).is_err());
        headers[1].vaddr = DIRECT_MAP.wrapping_add(SEGMENT_MAX);
        assert_eq!(Layout::decode(&headers).unwrap().origin, Origin::Vmcore);
    }
}
