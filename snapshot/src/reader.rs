//! Reading a snapshot: from a path to a value that can be restored.
//!
//! In: a path. Out: a [`Snapshot`], of which every byte outside RAM has been checked, and RAM's place in the file.
//! Holds: memory is taken only for what the file is long enough to hold, and for no more than 4 MiB of notes.

use crate::{
    Manifest, MappedRange, OpenError, RamError, SectionRef, VerifyError, chunk,
    delta::{self, DELTA, Delta},
    fault::Fault,
    packed::Packed,
    publish::describe,
    ram_check::{self, RamCheck},
    seal::{Seal, SealError, SealKey},
    section,
};
use rustix::fs::OFlags;
use snapshot_format::header::HEADER_LEN;
use snapshot_format::{HEADERS_MAX, Image, Notes, image, note};
use std::{
    fs::{self, File, OpenOptions},
    io,
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
    header: [u8; HEADER_LEN],
    vmcoreinfo: Option<Vec<u8>>,
    manifest: Manifest,
    state: Vec<u8>,
    table: Vec<u64>,
    ram: Vec<MappedRange>,
    delta: Option<Delta>,
    seal: Option<Seal>,
    /// Whether the seal is of a key that we know.
    authentic: bool,
}

/// What [`Snapshot::verify_ram`] read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSummary {
    /// Bytes of guest RAM that the file is of, holes included.
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

    /// A file that is open; `path` is what it is called.
    pub fn of(file: File, path: PathBuf) -> Self {
        Self { path, file }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What it is called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks everything but the contents of RAM.
    ///
    /// # Errors
    /// The first fault found; a file that holds only a difference to another.
    pub fn verify(self) -> Result<Snapshot, VerifyError> {
        let snapshot = self.verify_link()?;
        let Some(Delta { parent, .. }) = &snapshot.delta else { return Ok(snapshot) };
        let fault = snapshot_format::Fault::Incremental { parent: parent.generation.0 };
        Err(VerifyError { path: snapshot.path, fault: fault.into() })
    }

    /// The same of a file that may be a difference to another; see [`crate::Chain`].
    ///
    /// # Errors
    /// The first fault found.
    pub fn verify_link(self) -> Result<Snapshot, VerifyError> {
        let Self { path, file } = self;
        match read_parts(&file) {
            Ok((len, parts)) => {
                let Parts { header, vmcoreinfo, manifest, state, table, ram, packed, seal } = parts;
                let mut snapshot = Snapshot {
                    path,
                    file,
                    len,
                    header,
                    vmcoreinfo,
                    manifest,
                    state,
                    table,
                    ram,
                    delta: None,
                    seal,
                    authentic: false,
                };
                let packed = packed.then(|| snapshot.ram_bytes());
                match Delta::decode(&snapshot.manifest, snapshot.section(DELTA), packed) {
                    Ok(delta) => {
                        snapshot.delta = delta;
                        Ok(snapshot)
                    }
                    Err(error) => Err(VerifyError { path: snapshot.path, fault: Fault::Delta(error) }),
                }
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

    /// What it is a difference to, if it holds only that, and which pages.
    pub fn delta(&self) -> Option<&Delta> {
        self.delta.as_ref()
    }

    /// The fixed header of its notes: two files with the same one have the same manifest, state and chunk table.
    pub fn header(&self) -> &[u8; HEADER_LEN] {
        &self.header
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether whoever wrote it had a key; [`Snapshot::authenticate`] tells whose.
    pub fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// Refuses a snapshot that was not written with this key. Its RAM is then one's own once [`Snapshot::verify_ram`] has seen it.
    ///
    /// # Errors
    /// It has no seal, or one of another key.
    pub fn authenticate(self, key: &SealKey) -> Result<Self, SealError> {
        match &self.seal {
            None => Err(SealError::None(self.path)),
            Some(seal) if seal.is_of(key) => Ok(Self { authentic: true, ..self }),
            Some(_) => Err(SealError::Wrong(self.path)),
        }
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

    /// RAM, in the order of guest addresses; the ranges are the manifest's, and each lies wholly in the file. Of an incremental snapshot one range,
    /// which may be empty: its changed pages, one behind the other, counted from 0; [`crate::Chain::pieces`] knows their addresses.
    pub fn ram(&self) -> &[MappedRange] {
        &self.ram
    }

    /// Bytes of RAM that the file is of, holes included: the guest's, or the changed pages of it.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|mapped| mapped.range.len).sum()
    }

    /// What the guest's kernel told debuggers about itself: lines of text, by its word.
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.vmcoreinfo.as_deref()
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

    /// The chunk table: a digest for each chunk of [`Snapshot::ram`].
    pub fn digests(&self) -> &[u64] {
        &self.table
    }

    /// One digest of all RAM: XXH3, 64 bits, seed 0, of the chunk table, after which an incremental snapshot has the bits of its pages.
    pub fn ram_digest(&self) -> u64 {
        delta::ram_digest(&self.table, self.delta.as_ref().map(|delta| &delta.changed))
    }

    /// Bytes of RAM that are holes of the file, and so are known to be zero without being read.
    ///
    /// # Errors
    /// What the host said when it was asked for holes.
    pub fn zero_bytes(&self) -> io::Result<u64> {
        self.ram.iter().map(|mapped| ram_check::hole_bytes(&self.file, mapped)).sum()
    }

    /// Reads all of RAM and compares it with the chunk table, and with the digests of a seal that is known to be right. `progress` hears, after each chunk, how many bytes are
    /// done and how many there are.
    ///
    /// # Errors
    /// The first chunk that differs or cannot be read.
    pub fn verify_ram(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<RamSummary, RamError> {
        let sealed = self.seal.as_ref().filter(|_| self.authentic).map(|seal| seal.digests.as_slice());
        let packed = self.delta.as_ref().map(|delta| Packed::new(&delta.changed, &self.manifest.ram.ranges));
        let mut check = RamCheck::new(&self.path, &self.file, &self.table, sealed, packed);
        let ram_bytes = self.ram_bytes();
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
    header: [u8; HEADER_LEN],
    vmcoreinfo: Option<Vec<u8>>,
    manifest: Manifest,
    state: Vec<u8>,
    table: Vec<u64>,
    ram: Vec<MappedRange>,
    packed: bool,
    seal: Option<Seal>,
}

/// Bytes that are read first: the headers, and all that is before RAM in a snapshot of a small machine.
const FIRST_READ: u64 = 16 << 10;
const _: () = assert!(FIRST_READ >= HEADERS_MAX);

fn read_parts(file: &File) -> Result<(u64, Parts), Fault> {
    let metadata = file.metadata().map_err(|source| Fault::Read { what: "the file's length", source })?;
    let len = metadata.len();
    let mut head = read(file, "the headers", len.min(FIRST_READ))?;
    let layout = image::layout(&head, len)?;
    if layout.ram_start() > head.len() as u64 {
        head = read(file, "the notes", layout.ram_start())?;
    }
    head.truncate(layout.ram_start() as usize);
    let notes = Notes::find(&head, &layout)?;
    let manifest: Manifest = section::decode(note::MANIFEST.1, notes.manifest).map_err(Fault::Decode)?;
    manifest.check().map_err(Fault::Manifest)?;
    let image = Image::new(layout, notes)?;
    let table = chunk::digests(notes.table).collect();
    let (header, state, ram) = (notes.header.encode(), notes.state.to_vec(), image.layout.ram().to_vec());
    let vmcoreinfo = notes.vmcoreinfo.map(<[u8]>::to_vec);
    let seal = notes.seal.map(|desc| seal(desc, &notes)).transpose()?;
    let packed = image.layout.packed;
    Ok((len, Parts { header, vmcoreinfo, manifest, state, table, ram, packed, seal }))
}

fn seal(desc: &[u8], notes: &Notes<'_>) -> Result<Seal, Fault> {
    let mut sealed = Vec::new();
    notes.sealed(&mut sealed);
    Seal::decode(desc, &sealed).ok_or(Fault::Seal)
}

fn read(file: &File, what: &'static str, len: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|source| Fault::Read { what, source })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
