//! All checks but those of RAM, in their order, from the outside in.
//!
//! In: the headers, then the bytes before RAM. Out: an [`Image`]: where RAM lies, and the notes, each intact. Holds: the
//! file's length is checked before anything of that length is read; each byte before RAM is under a CRC, or has the one
//! value it can have, or Linux has chosen it.

use crate::header::{FixedHeader, Frame, check_len};
use crate::note::{self, Note};
use crate::outline::Outline;
use crate::{Fault, Layout, Origin, PRSTATUS_LEN, Part, RamRange, ShortText, chunk, elf};
use core::ops::Range;

/// Finds the parts of a file of `len` bytes that starts with `head`: its first [`crate::HEADERS_MAX`] bytes, or more, or all.
///
/// # Errors
/// Headers that no snapshot has, or a file of another length than they say.
pub fn layout(head: &[u8], len: u64) -> Result<Layout, Fault> {
    let layout = Layout::decode(&elf::decode(head)?)?;
    layout.check_len(len)?;
    Ok(layout)
}

/// The notes that make a core a snapshot, their frames checked.
#[derive(Clone, Copy, Debug)]
pub struct Notes<'a> {
    /// What covers them.
    pub header: FixedHeader,
    /// Its bytes.
    pub header_bytes: &'a [u8],
    /// Postcard.
    pub manifest: &'a [u8],
    /// The sections, one after another; their CRCs are checked by [`Image::new`].
    pub state: &'a [u8],
    /// One digest for each chunk of RAM.
    pub table: &'a [u8],
    /// What the guest's kernel tells debuggers about itself, if it does: lines of text.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// Who has a key can tell by this whether the rest is his own. Its CRC is right.
    pub seal: Option<&'a [u8]>,
    /// Bytes of all NT_PRSTATUS descriptors.
    registers: u64,
    segment: &'a [u8],
}

impl<'a> Notes<'a> {
    /// Finds them by owner and type, and checks lengths and CRCs. `head` is all of the file before RAM. In a file of our
    /// writer nothing else is there and each is in its place.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn find(head: &'a [u8], layout: &Layout) -> Result<Self, Fault> {
        check_padding(head, layout.headers_end..layout.notes.start)?;
        check_padding(head, layout.notes.end..layout.ram_start())?;
        let segment = part(head, &layout.notes)?;
        note::walk(segment).try_for_each(|note| note.map(drop))?;
        let only = |wanted| only(segment, wanted);
        let [header_bytes, manifest] = [only(note::HEADER)?, only(note::MANIFEST)?];
        let [state, table] = [only(note::STATE)?, only(note::TABLE)?];
        if layout.origin == Origin::Writer {
            check_order(segment)?;
        }
        let header = FixedHeader::decode(header_bytes)?;
        let named = |(_, name)| Part::Named(name);
        let vmcoreinfo = vmcoreinfo(segment);
        header.debugger.check(Part::Named("notes for debuggers"), registers(segment).chain(vmcoreinfo))?;
        header.manifest.check(named(note::MANIFEST), [manifest])?;
        check_len(named(note::STATE), state, header.state_len.into())?;
        header.table.check(named(note::TABLE), [table])?;
        let registers = registers(segment).map(|desc| desc.len() as u64).sum();
        let seal = seal(segment)?;
        Ok(Self { header, header_bytes, manifest, state, table, vmcoreinfo, seal, registers, segment })
    }

    /// All that is believed, as our writer lays it out: what a seal is of.
    pub fn sealed(&self, out: &mut impl Extend<u8>) {
        registers(self.segment).for_each(|desc| note::push(out, note::CORE, note::NT_PRSTATUS, desc));
        if let Some(desc) = self.vmcoreinfo {
            note::push(out, note::VMCOREINFO, note::NT_VMCOREINFO, desc);
        }
        let own = [self.header_bytes, self.manifest, self.state, self.table];
        for ((kind, _), desc) in [note::HEADER, note::MANIFEST, note::STATE, note::TABLE].iter().zip(own) {
            note::push(out, note::VMMSNAP, *kind, desc);
        }
    }
}

/// A snapshot of which all but RAM has been checked.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    /// RAM, in the order of guest addresses.
    pub layout: Layout,
    /// The notes.
    pub notes: Notes<'a>,
    /// Of the manifest.
    pub outline: Outline<'a>,
}

impl<'a> Image<'a> {
    /// Checks a whole file, of a full snapshot.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(file: &'a [u8]) -> Result<Self, Fault> {
        let layout = layout(file, file.len() as u64)?;
        let notes = Notes::find(part(file, &(0..layout.ram_start()))?, &layout)?;
        Self::new(layout, notes)?.full()
    }

    /// Refuses what holds only a difference to another.
    ///
    /// # Errors
    /// Names that other one.
    pub fn full(self) -> Result<Self, Fault> {
        self.outline.parent.map_or(Ok(self), |parent| Err(Fault::Incremental { parent }))
    }

    /// Holds the notes against each other and against the program headers. It may be a difference to another; see [`Image::full`].
    ///
    /// # Errors
    /// The first contradiction.
    pub fn new(layout: Layout, notes: Notes<'a>) -> Result<Self, Fault> {
        let outline = Outline::decode(notes.manifest)?;
        let expected = u64::from(outline.vcpus) * PRSTATUS_LEN;
        if notes.registers != expected {
            let what = Part::Named("NT_PRSTATUS notes");
            return Err(Fault::Length { what, found: notes.registers, expected });
        }
        let layout = layout.by_gpa();
        match (layout.packed, outline.parent) {
            (true, None) => return Err(Fault::NoParent),
            // Whether these are as many pages as it has a list of is known to who decodes the list.
            (true, Some(_)) => {}
            (false, _) => check_ranges(&layout, outline.ranges())?,
        }
        check_sections(&outline, notes.state)?;
        check_len(Part::Named(note::TABLE.1), notes.table, layout.chunks() * chunk::DIGEST_LEN)?;
        if let Some(seal) = notes.seal {
            check_len(Part::Named(note::SEAL.1), seal, note::seal_len(layout.chunks()))?;
        }
        Ok(Self { layout, notes, outline })
    }
}

/// Bytes that the layout says are there.
fn part<'a>(bytes: &'a [u8], range: &Range<u64>) -> Result<&'a [u8], Fault> {
    let len = bytes.len() as u64;
    let found = bytes.get(range.start as usize..range.end as usize);
    found.ok_or(Fault::Truncated { what: Part::Notes, end: range.end, len })
}

fn check_padding(head: &[u8], range: Range<u64>) -> Result<(), Fault> {
    let bytes = part(head, &range)?;
    match bytes.iter().zip(range.start..).find(|(byte, _)| **byte != 0) {
        None => Ok(()),
        Some((found, offset)) => Err(Fault::Padding { offset, found: *found }),
    }
}

fn intact(segment: &[u8]) -> impl Iterator<Item = Note<'_>> {
    note::walk(segment).map_while(Result::ok)
}

fn registers(segment: &[u8]) -> impl Iterator<Item = &[u8]> {
    intact(segment).filter(|note| note.is(note::CORE, note::NT_PRSTATUS)).map(|note| note.desc)
}

/// The note right before the fixed header: Linux may put one of its own ahead of all ours.
fn vmcoreinfo(segment: &[u8]) -> Option<&[u8]> {
    let mut before = None;
    for note in intact(segment).take_while(|note| !note.is(note::VMMSNAP, note::HEADER.0)) {
        before = note.is(note::VMCOREINFO, note::NT_VMCOREINFO).then_some(note.desc);
    }
    before
}

fn only<'a>(segment: &'a [u8], (kind, what): (u32, &'static str)) -> Result<&'a [u8], Fault> {
    let own = || intact(segment).filter(|note| note.is(note::VMMSNAP, kind));
    match (own().next(), own().count()) {
        (Some(note), 1) => Ok(note.desc),
        (_, found) => Err(Fault::NoteCount { what, found }),
    }
}

/// Its last four bytes are the CRC of the others.
fn seal(segment: &[u8]) -> Result<Option<&[u8]>, Fault> {
    let (kind, name) = note::SEAL;
    if !intact(segment).any(|note| note.is(note::VMMSNAP, kind)) {
        return Ok(None);
    }
    let desc = only(segment, note::SEAL)?;
    let what = Part::Named(name);
    let Some((sealed, crc)) = desc.split_last_chunk::<4>() else {
        return Err(Fault::Length { what, found: desc.len() as u64, expected: note::seal_len(0) });
    };
    let frame = Frame { len: sealed.len() as u32, crc: u32::from_le_bytes(*crc) };
    frame.check(what, [sealed]).map(|()| Some(desc))
}

/// First the registers, then VMCOREINFO if there is one, then our four, then the seal if there is one.
fn check_order(segment: &[u8]) -> Result<(), Fault> {
    let own = [note::HEADER, note::MANIFEST, note::STATE, note::TABLE, note::SEAL];
    let sealed = intact(segment).any(|note| note.is(note::VMMSNAP, note::SEAL.0));
    let own = &own[..own.len() - usize::from(!sealed)];
    let others = usize::from(vmcoreinfo(segment).is_some());
    let first = intact(segment).count() - own.len();
    for (index, note) in intact(segment).enumerate() {
        let (owner, (kind, expected)) = match index.checked_sub(first) {
            None if index + others == first => (note::VMCOREINFO, (note::NT_VMCOREINFO, "VMCOREINFO")),
            None => (note::CORE, (note::NT_PRSTATUS, "NT_PRSTATUS")),
            Some(place) => (note::VMMSNAP, own[place]),
        };
        if !note.is(owner, kind) {
            return Err(Fault::NoteOrder { index, expected });
        }
    }
    Ok(())
}

/// The program headers, in the order of guest addresses, and the manifest have the same ranges.
fn check_ranges(layout: &Layout, in_manifest: &[RamRange]) -> Result<(), Fault> {
    let in_file = || layout.ram().iter().map(|mapped| mapped.range);
    if in_file().eq(in_manifest.iter().copied()) {
        return Ok(());
    }
    let missing = in_manifest.iter().copied().find(|range| !in_file().any(|other| other == *range));
    let extra = in_file().find(|range| !in_manifest.contains(range));
    Err(Fault::Ranges { gpa: missing.or(extra).map_or(0, |range| range.gpa) })
}

/// The sections fill the machine state, and each has its CRC.
fn check_sections(outline: &Outline<'_>, state: &[u8]) -> Result<(), Fault> {
    let sum = outline.sections().map(|section| u64::from(section.len)).sum();
    check_len(Part::Named(note::STATE.1), state, sum)?;
    let mut rest = state;
    for section in outline.sections() {
        let bytes = note::take(&mut rest, section.len as usize).unwrap_or_default();
        let frame = Frame { len: section.len, crc: section.crc };
        frame.check(Part::Section(ShortText::of(section.name)), [bytes])?;
    }
    Ok(())
}
