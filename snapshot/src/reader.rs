//! Reading a snapshot: from a path to a value that can be restored.
//!
//! In: a path. Out: a [`Snapshot`], of which every byte outside RAM has been checked, and RAM's place in the file.
//! Holds: memory is taken only for what the file is long enough to hold, and for no more than 4 MiB of notes.

use crate::{
    HEADERS_MAX, Manifest, OpenError, RamError, SectionRef, VerifyError,
    chunk::{self, DIGEST_LEN},
    elf,
    fault::Fault,
    header::{FixedHeader, check_crc, check_len},
    layout::{Layout, MappedRange, Origin},
    note::{self, Note},
    prstatus::PRSTATUS_LEN,
    publish::describe,
    ram_check::{self, RamCheck},
    section,
};
use rustix::fs::OFlags;
use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// An open file of which nothing is known but that it is a regular file.
#[derive(Debug)]
pub struct UnverifiedSnapshot {
    path: PathBuf,
    file: File,
}

/// A snapshot whose headers, notes and lengths have been checked. Its RAM is checked by [`Snapshot::verify_ram`] only:
/// a guest does not trust its RAM more than it has to, and a restore must not read all of it.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    len: u64,
    manifest: Manifest,
    state: Vec<u8>,
    table: Vec<u64>,
    ram: Vec<MappedRange>,
}

/// What [`Snapshot::verify_ram`] read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSummary {
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of it that lie in holes of the file and did not have to be read.
    pub hole_bytes: u64,
}

impl UnverifiedSnapshot {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// It cannot be opened, or is no regular file. A pipe or a device is not touched.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let path = path.to_owned();
        match open_file(&path) {
            Ok(Ok(file)) => Ok(Self { path, file }),
            Ok(Err(found)) => Err(OpenError::NotAFile { path, found }),
            Err(source) => Err(OpenError::Open { path, source }),
        }
    }

    /// Checks everything but the contents of RAM.
    ///
    /// # Errors
    /// The first fault found.
    pub fn verify(self) -> Result<Snapshot, VerifyError> {
        let Self { path, file } = self;
        match read_parts(&file) {
            Ok((len, parts)) => {
                let Parts { manifest, state, table, ram } = parts;
                Ok(Snapshot { path, file, len, manifest, state, table, ram })
            }
            Err(fault) => Err(VerifyError { path, fault }),
        }
    }
}

impl Snapshot {
    /// Who, when, what.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be mapped. Its length was right when it was checked: whoever can write to the file can still
    /// shorten it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// RAM, in the order of guest addresses; the ranges are the manifest's, and each lies wholly in the file.
    pub fn ram(&self) -> &[MappedRange] {
        &self.ram
    }

    /// The machine state.
    pub fn sections(&self) -> impl Iterator<Item = SectionRef<'_>> {
        let mut rest = self.state.as_slice();
        self.manifest.sections.iter().map(move |entry| {
            let (bytes, left) = rest.split_at(entry.len as usize);
            rest = left;
            SectionRef { name: &entry.name, version: entry.version, bytes }
        })
    }

    /// The section of that name.
    pub fn section(&self, name: &str) -> Option<SectionRef<'_>> {
        self.sections().find(|section| section.name == name)
    }

    /// The chunk table: a digest for each chunk of RAM, in the order of guest addresses.
    pub fn digests(&self) -> &[u64] {
        &self.table
    }

    /// Bytes of RAM that are holes of the file, and so are known to be zero without being read.
    ///
    /// # Errors
    /// What the host said when it was asked for holes.
    pub fn zero_bytes(&self) -> io::Result<u64> {
        self.ram.iter().map(|mapped| ram_check::hole_bytes(&self.file, mapped)).sum()
    }

    /// Reads all of RAM and compares it with the chunk table. `progress` hears, after each chunk, how many bytes are
    /// done and how many there are.
    ///
    /// # Errors
    /// The first chunk that differs or cannot be read.
    pub fn verify_ram(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<RamSummary, RamError> {
        let mut check = RamCheck::new(&self.path, &self.file, &self.table);
        let ram_bytes = self.manifest.ram.bytes;
        for mapped in &self.ram {
            check.check_range(mapped, &mut |done| progress(done, ram_bytes))?;
        }
        Ok(RamSummary { ram_bytes, hole_bytes: check.hole_bytes })
    }
}

/// Opens a regular file, or says what else it is. The second look is at what was opened, in case the name has moved;
/// with `O_NONBLOCK` a pipe does not make it wait.
fn open_file(path: &Path) -> io::Result<Result<File, &'static str>> {
    if let Some(found) = describe(fs::metadata(path)?.file_type()) {
        return Ok(Err(found));
    }
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    Ok(describe(file.metadata()?.file_type()).map_or(Ok(file), Err))
}

/// What the notes hold, and where RAM is.
struct Parts {
    manifest: Manifest,
    state: Vec<u8>,
    table: Vec<u64>,
    ram: Vec<MappedRange>,
}

fn read_parts(file: &File) -> Result<(u64, Parts), Fault> {
    let metadata = file.metadata().map_err(|source| Fault::Read { what: "the file's length", source })?;
    let len = metadata.len();
    let head = read(file, "the headers", len.min(HEADERS_MAX))?;
    let layout = Layout::decode(&elf::decode(&head)?)?;
    check_file_len(&layout, len)?;
    let head = read(file, "the notes", layout.ram_start())?;
    check_padding(&head, layout.headers_end..layout.notes.start)?;
    check_padding(&head, layout.notes.end..layout.ram_start())?;
    let notes = note::parse(&head[layout.notes.start as usize..layout.notes.end as usize])?;
    let own = OwnNotes::find(&notes, layout.origin)?;
    Ok((len, own.check(&layout)?))
}

fn read(file: &File, what: &'static str, len: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|source| Fault::Read { what, source })?;
    Ok(bytes)
}

/// The file ends where its last part ends: a shorter one lacks something, in a longer one something is unaccounted for.
fn check_file_len(layout: &Layout, len: u64) -> Result<(), Fault> {
    let notes = ("the notes".to_owned(), layout.ram_start());
    let name = |mapped: &MappedRange| format!("the RAM range at GPA {:#x}", mapped.range.gpa);
    let ram = layout.ram.iter().map(|mapped| (name(mapped), mapped.offset + mapped.range.len));
    if let Some((what, end)) = std::iter::once(notes).chain(ram).find(|(_, end)| len < *end) {
        return Err(Fault::Truncated { what, end, len });
    }
    if len > layout.end() {
        return Err(Fault::TooLong { end: layout.end(), len });
    }
    Ok(())
}

fn check_padding(head: &[u8], range: Range<u64>) -> Result<(), Fault> {
    let mut bytes = range.clone().zip(&head[range.start as usize..range.end as usize]);
    match bytes.find(|(_, byte)| **byte != 0) {
        None => Ok(()),
        Some((offset, found)) => Err(Fault::Padding { offset, found: *found }),
    }
}

/// The notes that make a core a snapshot.
struct OwnNotes<'a> {
    prstatus: Vec<Note<'a>>,
    header: &'a [u8],
    manifest: &'a [u8],
    state: &'a [u8],
    table: &'a [u8],
}

impl<'a> OwnNotes<'a> {
    /// Finds them by owner and type. In a file of our writer nothing else is there and each is in its place.
    fn find(notes: &[Note<'a>], origin: Origin) -> Result<Self, Fault> {
        let prstatus = notes.iter().filter(|note| note.is(note::CORE, note::NT_PRSTATUS));
        let own = Self {
            prstatus: prstatus.copied().collect(),
            header: only(notes, note::HEADER)?,
            manifest: only(notes, note::MANIFEST)?,
            state: only(notes, note::STATE)?,
            table: only(notes, note::TABLE)?,
        };
        if origin == Origin::Writer {
            check_order(notes)?;
        }
        Ok(own)
    }

    /// Checks lengths and CRCs from the outside in, and what they protect.
    fn check(&self, layout: &Layout) -> Result<Parts, Fault> {
        let header = FixedHeader::decode(self.header)?;
        let registers = self.prstatus.iter().map(|note| note.desc).collect::<Vec<_>>().concat();
        header.prstatus.check("NT_PRSTATUS notes", &registers)?;
        header.manifest.check(note::MANIFEST.1, self.manifest)?;
        check_len(note::STATE.1, self.state, header.state_len.into())?;
        header.table.check(note::TABLE.1, self.table)?;
        let manifest: Manifest = section::decode(note::MANIFEST.1, self.manifest).map_err(Fault::Decode)?;
        manifest.check().map_err(Fault::Manifest)?;
        let ram = check_manifest(&manifest, layout, registers.len() as u64)?;
        check_sections(&manifest, self.state)?;
        check_len(note::TABLE.1, self.table, chunk::count(&manifest.ram.ranges) * DIGEST_LEN)?;
        Ok(Parts { manifest, state: self.state.to_vec(), table: chunk::decode_table(self.table), ram })
    }
}

fn only<'a>(notes: &[Note<'a>], (kind, what): (u32, &'static str)) -> Result<&'a [u8], Fault> {
    let found: Vec<_> = notes.iter().filter(|note| note.is(note::VMMSNAP, kind)).collect();
    match found[..] {
        [note] => Ok(note.desc),
        _ => Err(Fault::NoteCount { what, found: found.len() }),
    }
}

/// First the registers, then our four.
fn check_order(notes: &[Note<'_>]) -> Result<(), Fault> {
    let own = [note::HEADER, note::MANIFEST, note::STATE, note::TABLE];
    let first = notes.len() - own.len();
    for (index, note) in notes.iter().enumerate() {
        let (owner, (kind, expected)) = match index.checked_sub(first) {
            None => (note::CORE, (note::NT_PRSTATUS, "NT_PRSTATUS")),
            Some(place) => (note::VMMSNAP, own[place]),
        };
        if !note.is(owner, kind) {
            return Err(Fault::NoteOrder { index, expected });
        }
    }
    Ok(())
}

/// Holds the manifest against what the ELF says. Returns RAM in the order of guest addresses.
fn check_manifest(manifest: &Manifest, layout: &Layout, registers: u64) -> Result<Vec<MappedRange>, Fault> {
    if let Some(parent) = manifest.parent {
        return Err(Fault::Incremental { parent });
    }
    let expected = u64::from(manifest.vcpus) * PRSTATUS_LEN as u64;
    if registers != expected {
        return Err(Fault::Length { what: "NT_PRSTATUS notes".to_owned(), found: registers, expected });
    }
    let ram = layout.ram_by_gpa();
    let in_file = ram.iter().map(|mapped| mapped.range);
    let in_manifest = manifest.ram.ranges.iter().copied();
    if in_file.clone().eq(in_manifest.clone()) {
        return Ok(ram);
    }
    let only_here = |range: &crate::RamRange| in_file.clone().any(|other| other == *range);
    let missing = in_manifest.clone().find(|range| !only_here(range));
    let extra = in_file.clone().find(|range| !manifest.ram.ranges.contains(range));
    Err(Fault::Ranges { gpa: missing.or(extra).map_or(0, |range| range.gpa) })
}

/// The sections fill the machine state, and each has its CRC.
fn check_sections(manifest: &Manifest, state: &[u8]) -> Result<(), Fault> {
    let sum = manifest.sections.iter().map(|entry| u64::from(entry.len)).sum();
    check_len(note::STATE.1, state, sum)?;
    let mut rest = state;
    for entry in &manifest.sections {
        let (bytes, left) = rest.split_at(entry.len as usize);
        check_crc(&format!("section {}", entry.name), bytes, entry.crc)?;
        rest = left;
    }
    Ok(())
}
