//! Where notes and RAM lie in a file, in the two layouts a snapshot can have.
//!
//! In: RAM ranges and the length of the notes, or a file's program headers. Out: those headers, or the places. Holds:
//! each layout leaves one place for everything, notes and RAM follow one another, and no number from a file is added
//! to before it is bounded.

use crate::elf::{PT_LOAD, PT_NOTE, ProgramHeader, ProgramHeaders, expect};
use crate::{
    EHDR_LEN, Expected, Fault, GPA_END, NOTE_HEADER_LEN, NOTES_MAX, PAGE_SIZE, PHDR_LEN, Part,
    RAM_RANGES_MAX, RamRange,
};
use core::ops::Range;

/// Read, write, execute.
const RWX: u32 = 7;
/// Where x86-64 Linux maps all RAM when it is not randomised (`Documentation/arch/x86/x86_64/mm.rst`).
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

/// A RAM range and its place in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedRange {
    /// In the guest.
    pub range: RamRange,
    /// Of its first byte in the file, a multiple of the page size.
    pub offset: u64,
}

/// Who laid a file out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The `snapshot` crate's writer: notes right after the headers, nothing left to choose.
    Writer,
    /// Linux, as `/proc/vmcore`: notes at the next page, with others among them.
    Vmcore,
}

/// At most [`RAM_RANGES_MAX`] ranges.
#[derive(Clone, Copy, Debug)]
struct Ranges {
    items: [MappedRange; RAM_RANGES_MAX],
    len: usize,
}

/// Where everything is in a file.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Who laid it out.
    pub origin: Origin,
    /// End of the program headers.
    pub headers_end: u64,
    /// All notes.
    pub notes: Range<u64>,
    ram: Ranges,
}

impl Layout {
    fn new(origin: Origin, headers_end: u64, notes: Range<u64>) -> Self {
        let ram = Ranges { items: [MappedRange::default(); RAM_RANGES_MAX], len: 0 };
        Self { origin, headers_end, notes, ram }
    }

    /// The layout of a file to be written. The caller has checked the ranges, their number, and the notes' length.
    pub fn plan(ranges: &[RamRange], notes_len: u64) -> Self {
        let headers_end = EHDR_LEN + (1 + ranges.len() as u64) * PHDR_LEN;
        let mut layout = Self::new(Origin::Writer, headers_end, headers_end..headers_end + notes_len);
        for range in ranges {
            layout.push(MappedRange { range: *range, offset: layout.end() });
        }
        layout
    }

    /// The program headers of a planned file.
    pub fn headers(&self) -> impl Iterator<Item = ProgramHeader> + '_ {
        core::iter::once(note_header(&self.notes)).chain(self.ram().iter().map(load_header))
    }

    /// The layout that these program headers describe; of the file's length nothing is known yet.
    ///
    /// # Errors
    /// A field that neither layout has.
    pub fn decode(headers: &ProgramHeaders<'_>) -> Result<Self, Fault> {
        let note_at = find_notes(headers)?;
        let note = headers.iter().nth(note_at).ok_or(Fault::Empty)?;
        let (origin, notes) = check_note(note_at, &note, headers.end())?;
        if origin == Origin::Writer {
            expect(Part::ElfHeader, "index of PT_NOTE", note_at as u64, Expected::One(0))?;
        }
        let mut layout = Self::new(origin, headers.end(), notes);
        for (index, header) in headers.iter().enumerate().filter(|(index, _)| *index != note_at) {
            let mapped = layout.check_load(index, &header)?;
            layout.push(mapped);
        }
        Ok(layout)
    }

    /// RAM in the order of the program headers, which is also the order in the file.
    pub fn ram(&self) -> &[MappedRange] {
        &self.ram.items[..self.ram.len]
    }

    /// Where RAM starts in the file.
    pub fn ram_start(&self) -> u64 {
        let end = match self.origin {
            Origin::Writer => self.notes.end + NOTE_HEADER_LEN,
            Origin::Vmcore => self.notes.end,
        };
        end.next_multiple_of(PAGE_SIZE)
    }

    /// Where the last RAM range so far ends, and at last the file.
    pub fn end(&self) -> u64 {
        self.ram().last().map_or(self.ram_start(), |last| last.offset + last.range.len)
    }

    /// The same, with RAM in the order of guest addresses.
    pub fn by_gpa(mut self) -> Self {
        let ram = &mut self.ram.items[..self.ram.len];
        // An insertion sort of few: the core library's would be the longest part of the stub.
        for next in 1..ram.len() {
            let gpa = ram[next].range.gpa;
            let place = ram[..next].iter().position(|other| other.range.gpa > gpa).unwrap_or(next);
            ram[place..=next].rotate_right(1);
        }
        self
    }

    /// The file ends where its last part ends: a shorter one lacks something, in a longer one something is unaccounted
    /// for.
    ///
    /// # Errors
    /// Another length, and the first part that is not there in full.
    pub fn check_len(&self, len: u64) -> Result<(), Fault> {
        let notes = (Part::Notes, self.ram_start());
        let end = |mapped: &MappedRange| (Part::Ram(mapped.range.gpa), mapped.offset + mapped.range.len);
        let mut ends = core::iter::once(notes).chain(self.ram().iter().map(end));
        if let Some((what, end)) = ends.find(|(_, end)| len < *end) {
            return Err(Fault::Truncated { what, end, len });
        }
        if len > self.end() {
            return Err(Fault::TooLong { end: self.end(), len });
        }
        Ok(())
    }

    /// What is one too many is left out: neither a plan nor a file has it.
    fn push(&mut self, mapped: MappedRange) {
        if let Some(place) = self.ram.items.get_mut(self.ram.len) {
            *place = mapped;
            self.ram.len += 1;
        }
    }

    /// Checks the next PT_LOAD. Linux copies flags, addresses and alignment from the program headers that it was given
    /// and may have been given direct-map addresses.
    fn check_load(&self, index: usize, header: &ProgramHeader) -> Result<MappedRange, Fault> {
        let what = Part::LoadSegment(index);
        let mapped = header.paddr.wrapping_add(DIRECT_MAP);
        let (align, vaddr) = match self.origin {
            Origin::Writer => (Expected::One(0), Expected::One(header.paddr)),
            Origin::Vmcore => (Expected::Either(0, PAGE_SIZE), Expected::Either(header.paddr, mapped)),
        };
        expect(what, "p_flags", header.flags.into(), Expected::One(RWX.into()))?;
        expect(what, "p_align", header.align, align)?;
        expect(what, "p_memsz", header.memsz, Expected::One(header.filesz))?;
        // RAM segments are longer than no address space: with at most 64 of them, sums cannot overflow.
        expect(what, "p_filesz", header.filesz, Expected::Pages(PAGE_SIZE, GPA_END))?;
        expect(what, "p_paddr", header.paddr, Expected::Pages(0, GPA_END))?;
        expect(what, "p_vaddr", header.vaddr, vaddr)?;
        expect(what, "p_offset", header.offset, Expected::One(self.end()))?;
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

/// `p_vaddr` is the physical address, so that gdb reads memory of a guest that maps its own one to one. `p_align` is 0, no
/// alignment: by another, crash takes a core for one of netdump's, and looks neither at its registers nor where its kernel lies.
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
        align: 0,
    }
}

/// The index of the one PT_NOTE; all others have to be PT_LOAD.
fn find_notes(headers: &ProgramHeaders<'_>) -> Result<usize, Fault> {
    let notes = headers.iter().position(|header| header.kind == PT_NOTE).unwrap_or(0);
    for (index, header) in headers.iter().enumerate() {
        let kind = if index == notes { PT_NOTE } else { PT_LOAD };
        expect(Part::ProgramHeader(index), "p_type", header.kind.into(), Expected::One(kind.into()))?;
    }
    Ok(notes)
}

/// Checks PT_NOTE. Linux left `p_align` at 0 for a long time and sets it to 4 in newer versions.
fn check_note(index: usize, header: &ProgramHeader, headers_end: u64) -> Result<(Origin, Range<u64>), Fault> {
    let what = Part::NoteSegment(index);
    let page = headers_end.next_multiple_of(PAGE_SIZE);
    expect(what, "p_offset", header.offset, Expected::Either(headers_end, page))?;
    let (origin, align) = if header.offset == page {
        (Origin::Vmcore, Expected::Either(0, 4))
    } else {
        (Origin::Writer, Expected::One(4))
    };
    expect(what, "p_flags", header.flags.into(), Expected::One(0))?;
    expect(what, "p_vaddr", header.vaddr, Expected::One(0))?;
    expect(what, "p_paddr", header.paddr, Expected::One(0))?;
    expect(what, "p_align", header.align, align)?;
    expect(what, "p_memsz", header.memsz, Expected::One(header.filesz))?;
    expect(what, "p_filesz", header.filesz, Expected::Between(1, NOTES_MAX - 1))?;
    Ok((origin, header.offset..header.offset + header.filesz))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf;
    use std::vec::Vec;

    fn encode(headers: &[ProgramHeader]) -> Vec<u8> {
        let mut out = elf::encode_header(headers.len() as u16).to_vec();
        headers.iter().for_each(|header| out.extend(header.encode()));
        out
    }

    fn planned(layout: &Layout) -> Vec<u8> {
        encode(&layout.headers().collect::<Vec<_>>())
    }

    fn decode(bytes: &[u8]) -> Result<Layout, Fault> {
        Layout::decode(&elf::decode(bytes)?)
    }

    #[test]
    fn decodes_what_it_plans() {
        let ranges = [RamRange { gpa: 0, len: 8192 }, RamRange { gpa: 1 << 32, len: 4096 }];
        let plan = Layout::plan(&ranges, 1000);
        assert_eq!(plan.ram()[0].offset, 4096);
        assert_eq!(plan.end(), 4096 + 8192 + 4096);
        let found = decode(&planned(&plan)).unwrap();
        assert_eq!((found.origin, &found.notes, found.ram()), (plan.origin, &plan.notes, plan.ram()));
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
        let good = planned(&plan);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let found = decode(&bad);
            assert!(found.is_err(), "bit {bit}: {found:?}");
        }
    }

    #[test]
    fn the_last_address_and_the_direct_map_do_not_overflow() {
        let plan = Layout::plan(&[RamRange { gpa: GPA_END, len: 4096 }], 1000);
        let mut headers: Vec<_> = plan.headers().collect();
        headers[0].offset = PAGE_SIZE;
        headers[1].offset = 2 * PAGE_SIZE;
        headers[1].vaddr = DIRECT_MAP;
        assert!(decode(&encode(&headers)).is_err());
        headers[1].vaddr = DIRECT_MAP.wrapping_add(GPA_END);
        assert_eq!(decode(&encode(&headers)).unwrap().origin, Origin::Vmcore);
    }
}
