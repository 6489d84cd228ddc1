//! Where notes and RAM lie in a file, in the two layouts a snapshot can have.
//!
//! In: RAM ranges and the length of the notes, or a file's program headers. Out: those headers, or the places. Holds:
//! each layout leaves one place for everything, notes and RAM follow one another, and no number from a file is added
//! to before it is bounded.
//!
//! RAM of an incremental snapshot is its changed pages, one behind the other, in one segment of a type of our own: whoever does not know it
//! sees no memory there, rather than zeroes where it is the parent's. What the pages' addresses are says the machine state.

use crate::elf::{PT_LOAD, PT_NOTE, PT_PACKED, ProgramHeader, ProgramHeaders, expect};
use crate::{
    EHDR_LEN, Expected, Fault, GPA_END, NOTE_HEADER_LEN, NOTES_MAX, PAGE_SIZE, PHDR_LEN, Part,
    RAM_RANGES_MAX, RamRange, chunk,
};
use core::ops::Range;

/// Read, write, execute.
const RWX: u32 = 7;
/// Read.
const R: u32 = 4;
/// Where x86-64 Linux maps all RAM when it is not randomised (`Documentation/arch/x86/x86_64/mm.rst`).
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

/// A RAM range and its place in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedRange {
    /// In the guest. In a packed layout its addresses are those of the packed pages, from 0 on.
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
    /// Whether RAM is changed pages, one behind the other: its one range, which may be empty, has nothing to do with the guest's addresses.
    pub packed: bool,
    ram: Ranges,
}

impl Layout {
    fn new(origin: Origin, headers_end: u64, notes: Range<u64>) -> Self {
        let ram = Ranges { items: [MappedRange::default(); RAM_RANGES_MAX], len: 0 };
        Self { origin, headers_end, notes, packed: false, ram }
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

    /// The same with so many bytes of changed pages. The caller has checked that RAM has as many.
    pub fn plan_packed(len: u64, notes_len: u64) -> Self {
        Self { packed: true, ..Self::plan(&[RamRange { gpa: 0, len }], notes_len) }
    }

    /// The program headers of a planned file.
    pub fn headers(&self) -> impl Iterator<Item = ProgramHeader> + '_ {
        let header = if self.packed { packed_header } else { load_header };
        core::iter::once(note_header(&self.notes)).chain(self.ram().iter().map(header))
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
        let mut layout = Self { packed: is_packed(headers), ..Self::new(origin, headers.end(), notes) };
        for (index, header) in headers.iter().enumerate().filter(|(index, _)| *index != note_at) {
            let mapped = if layout.packed {
                layout.check_packed(index, &header)?
            } else {
                layout.check_load(index, &header)?
            };
            layout.push(mapped);
        }
        Ok(layout)
    }

    /// Number of chunks of RAM.
    pub fn chunks(&self) -> u64 {
        self.ram().iter().map(|mapped| chunk::count(&[mapped.range])).sum()
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
        let name = |gpa| if self.packed { Part::Packed } else { Part::Ram(gpa) };
        let end = |mapped: &MappedRange| (name(mapped.range.gpa), mapped.offset + mapped.range.len);
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

    /// The same of the only PT_PACKED, which Linux would not relay.
    fn check_packed(&self, index: usize, header: &ProgramHeader) -> Result<MappedRange, Fault> {
        expect(Part::NoteSegment(0), "p_offset", self.notes.start, Expected::One(self.headers_end))?;
        let what = Part::PackedSegment(index);
        expect(what, "p_filesz", header.filesz, Expected::Pages(0, GPA_END))?;
        let mapped = MappedRange { range: RamRange { gpa: 0, len: header.filesz }, offset: self.end() };
        let planned = packed_header(&mapped);
        expect(what, "p_flags", header.flags.into(), Expected::One(planned.flags.into()))?;
        expect(what, "p_align", header.align, Expected::One(planned.align))?;
        expect(what, "p_memsz", header.memsz, Expected::One(planned.memsz))?;
        expect(what, "p_paddr", header.paddr, Expected::One(planned.paddr))?;
        expect(what, "p_vaddr", header.vaddr, Expected::One(planned.vaddr))?;
        expect(what, "p_offset", header.offset, Expected::One(planned.offset))?;
        Ok(mapped)
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

/// It takes no memory at any address: it is no part of the machine by itself.
fn packed_header(mapped: &MappedRange) -> ProgramHeader {
    let MappedRange { range: RamRange { len, .. }, offset } = *mapped;
    ProgramHeader { kind: PT_PACKED, flags: R, offset, vaddr: 0, paddr: 0, filesz: len, memsz: 0, align: 0 }
}

/// Whether notes and one PT_PACKED are all there is.
fn is_packed(headers: &ProgramHeaders<'_>) -> bool {
    headers.iter().len() == 2 && headers.iter().any(|header| header.kind == PT_PACKED)
}

/// The index of the one PT_NOTE; all others have to be PT_LOAD, or the only other one PT_PACKED.
fn find_notes(headers: &ProgramHeaders<'_>) -> Result<usize, Fault> {
    let notes = headers.iter().position(|header| header.kind == PT_NOTE).unwrap_or(0);
    let ram = if is_packed(headers) { PT_PACKED } else { PT_LOAD };
    for (index, header) in headers.iter().enumerate() {
        let kind = if index == notes { PT_NOTE } else { ram };
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
mod tests;
