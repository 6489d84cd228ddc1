//! Writing a snapshot.
//!
//! In: [`Contents`] and a path. Out: the file, and a [`Summary`]. Holds: RAM is read once; the length of the notes follows from the layout
//! alone, so their place is kept free until the digests are known.

use crate::{
    About, Delta, Manifest, ManifestError, NOTES_MAX, RamRange, Registers, Section, SectionEntry,
    SectionError, chunk,
    manifest::RamFormat,
    prstatus::PRSTATUS_LEN,
    publish::{NewFile, PublishError},
    ram_writer::{self, Written},
    seal::{self, Seal, SealKey},
};
use snapshot_format::{
    Layout, elf,
    header::{FixedHeader, Frame, HEADER_LEN},
    note,
};
use std::{
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Where a snapshot's RAM comes from: several threads read it, no byte of it twice.
pub trait RamSource: Sync {
    /// The machine's RAM, in the order of guest physical addresses.
    fn ranges(&self) -> &[RamRange];

    /// Fills `buf` with the RAM at `gpa`: a whole chunk, or the rest of a range. A source that knows the chunk to be
    /// untouched says [`ChunkContent::Zero`] and need not fill anything.
    ///
    /// # Errors
    /// The RAM cannot be read; the snapshot is given up.
    fn read_chunk(&self, gpa: u64, buf: &mut [u8]) -> io::Result<ChunkContent>;

    /// Fills `buf` with the RAM at `gpa`: pages of one chunk, which changed.
    ///
    /// # Errors
    /// The RAM cannot be read; the snapshot is given up.
    fn read_pages(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.read_chunk(gpa, buf)? == ChunkContent::Zero {
            buf.fill(0);
        }
        Ok(())
    }

    /// Called when all is read, before the snapshot has its name: the last chance to say that what was read is no good.
    ///
    /// # Errors
    /// It is no good; the snapshot is given up.
    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What [`RamSource::read_chunk`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkContent {
    /// Zeroes throughout; the buffer is not looked at.
    Zero,
    /// What is in the buffer.
    Data,
}

/// A machine to be written.
pub struct Contents<'a> {
    /// For the manifest.
    pub about: About,
    /// One for each vCPU.
    pub vcpus: &'a [Registers],
    /// What the guest's kernel tells debuggers about itself, if it does.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// The machine state.
    pub sections: &'a [Section],
    /// The machine's RAM.
    pub ram: &'a dyn RamSource,
    /// What is left out, because a parent has it; a full snapshot leaves out nothing.
    pub delta: Option<&'a Delta>,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of it in pages that are not all zero.
    pub data_bytes: u64,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// Bytes that the file system has allocated for it.
    pub allocated: u64,
    /// Whether the guest's kernel tells debuggers about itself in it.
    pub vmcoreinfo: bool,
    /// XXH3 of its chunk table, as in [`crate::Parent`].
    pub ram_digest: u64,
    /// Time to read, digest and write RAM.
    pub ram_time: Duration,
    /// Time to write the notes, sync, and rename.
    pub publish_time: Duration,
}

impl Summary {
    /// Bytes of guest RAM in zero pages, which take no room.
    pub fn zero_bytes(&self) -> u64 {
        self.ram_bytes - self.data_bytes
    }
}

/// A snapshot was not written. What was there under its name still is, with one exception: [`WriteError::is_in_place`].
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// What was to be written contradicts itself.
    #[error("this machine cannot be written as a snapshot")]
    Manifest(#[from] ManifestError),
    /// The manifest has no postcard form.
    #[error("the manifest cannot be encoded")]
    Encode(#[from] SectionError),
    /// Machine state and chunk table together are too long.
    #[error("the notes would take {len} bytes, and the format has room for {}: too much machine state or RAM", NOTES_MAX - 1)]
    NotesTooLong {
        /// Bytes of all notes.
        len: u64,
    },
    /// RAM could not be read.
    #[error("cannot read guest RAM at GPA {gpa:#x}")]
    Ram {
        /// Start of the chunk.
        gpa: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The file could not be written, mostly because the disk is full.
    #[error("cannot write {}", path.display())]
    Write {
        /// The snapshot.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file could not be created or given its name.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl WriteError {
    /// Whether the snapshot is there all the same: whole, but a power cut may undo it.
    pub fn is_in_place(&self) -> bool {
        matches!(self, Self::Publish(PublishError::Unsynced { .. }))
    }
}

/// Writes a snapshot to `path`, replacing the regular file that may be there. `progress` hears, after each chunk, how
/// many bytes of RAM are done and how many there are.
///
/// # Errors
/// See [`WriteError`]. Nothing of the new snapshot stays behind, and an old one of that name is untouched, unless
/// [`WriteError::is_in_place`].
pub fn write(
    path: &Path,
    contents: &Contents,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, WriteError> {
    write_sealed(path, contents, None, progress)
}

/// The same with a key, by which whoever has it too can tell the snapshot from others'.
///
/// # Errors
/// As [`write()`].
pub fn write_sealed(
    path: &Path,
    contents: &Contents,
    key: Option<&SealKey>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, WriteError> {
    let notes = Notes::new(contents)?;
    let seal_len = key.map_or(0, |_| note::note_len(note::VMMSNAP, Seal::len(notes.chunks)));
    check_len(notes.len() + seal_len)?;
    let layout = Layout::plan(contents.ram.ranges(), notes.len() + seal_len);
    let new = NewFile::create(path)?;
    let failed = |source| WriteError::Write { path: new.target().to_owned(), source };
    // First the length, so that a limit on it shows before the work is done; holes stay where nothing is written.
    new.file().set_len(layout.end()).map_err(failed)?;
    let started = Instant::now();
    let written = ram_writer::write(new.file(), layout.ram(), contents, progress);
    let Written { digests, data_bytes, ram_bytes } = written.map_err(|error| error.at(new.target()))?;
    contents.ram.finish().map_err(|source| WriteError::Ram { gpa: 0, source })?;
    let (ram_time, started) = (started.elapsed(), Instant::now());
    let ram_digest = chunk::digest(&chunk::encode_table(&digests));
    let mut notes = notes.encode(&digests);
    if let Some(key) = key {
        // What is sealed is what is in the file, which nobody else can open yet.
        let chunks = seal::digests(new.file(), layout.ram()).map_err(failed)?;
        let seal = Seal::encode(key, &notes, &chunks);
        note::push(&mut notes, note::VMMSNAP, note::SEAL.0, &seal);
    }
    let head = [encode_headers(&layout), notes].concat();
    new.file().write_all_at(&head, 0).map_err(failed)?;
    let file = new.file().try_clone().map_err(failed)?;
    new.publish()?;
    let allocated = file.metadata().map_or(0, |metadata| metadata.blocks() * 512);
    let publish_time = started.elapsed();
    let (file_len, vmcoreinfo) = (layout.end(), contents.vmcoreinfo.is_some());
    Ok(Summary { ram_bytes, data_bytes, file_len, allocated, vmcoreinfo, ram_digest, ram_time, publish_time })
}

/// The notes, except for the chunk table, of which the length is known.
pub(crate) struct Notes {
    prstatus: Vec<[u8; PRSTATUS_LEN]>,
    vmcoreinfo: Option<Vec<u8>>,
    manifest: Vec<u8>,
    state: Vec<u8>,
    chunks: u64,
}

impl Notes {
    /// Refuses a manifest that no reader would take, and notes that are too long.
    pub(crate) fn new(contents: &Contents) -> Result<Self, WriteError> {
        let delta = contents.delta.map(Delta::encode).transpose()?;
        let sections: Vec<_> = contents.sections.iter().chain(&delta).collect();
        let state_len = sections.iter().map(|section| section.bytes.len() as u64).sum();
        check_len(state_len)?;
        let manifest = manifest(contents, &sections);
        manifest.check()?;
        let state = sections.iter().flat_map(|section| section.bytes.iter().copied()).collect();
        let notes = Self {
            prstatus: contents.vcpus.iter().zip(0..).map(|(vcpu, index)| vcpu.prstatus(index)).collect(),
            vmcoreinfo: contents.vmcoreinfo.map(<[u8]>::to_vec),
            manifest: Section::encode("manifest", crate::FORMAT_VERSION, &manifest)?.bytes,
            state,
            chunks: chunk::count(&manifest.ram.ranges),
        };
        check_len(notes.len())?;
        Ok(notes)
    }

    /// Bytes of all notes.
    pub(crate) fn len(&self) -> u64 {
        let prstatus = note::note_len(note::CORE, PRSTATUS_LEN as u64) * self.prstatus.len() as u64;
        let vmcoreinfo =
            self.vmcoreinfo.as_ref().map_or(0, |desc| note::note_len(note::VMCOREINFO, desc.len() as u64));
        let lens = [HEADER_LEN as u64, self.manifest.len() as u64, self.state.len() as u64];
        let own = lens.into_iter().chain([self.chunks * chunk::DIGEST_LEN]);
        prstatus + vmcoreinfo + own.map(|len| note::note_len(note::VMMSNAP, len)).sum::<u64>()
    }

    /// Their bytes, with the digests of all chunks.
    pub(crate) fn encode(&self, digests: &[u64]) -> Vec<u8> {
        let table = chunk::encode_table(digests);
        let header = FixedHeader {
            debugger: Frame::of(self.prstatus.iter().map(|desc| &desc[..]).chain(self.vmcoreinfo.as_deref())),
            manifest: Frame::of([&self.manifest[..]]),
            table: Frame::of([&table[..]]),
            state_len: self.state.len() as u32,
        };
        let mut out = Vec::new();
        self.prstatus.iter().for_each(|desc| note::push(&mut out, note::CORE, note::NT_PRSTATUS, desc));
        if let Some(desc) = &self.vmcoreinfo {
            note::push(&mut out, note::VMCOREINFO, note::NT_VMCOREINFO, desc);
        }
        let own = [&header.encode()[..], &self.manifest, &self.state, &table];
        for ((kind, _), desc) in [note::HEADER, note::MANIFEST, note::STATE, note::TABLE].iter().zip(own) {
            note::push(&mut out, note::VMMSNAP, *kind, desc);
        }
        out
    }
}

/// The ELF header and program headers of a planned file.
fn encode_headers(layout: &Layout) -> Vec<u8> {
    let headers: Vec<_> = layout.headers().collect();
    let mut out = elf::encode_header(headers.len() as u16).to_vec();
    headers.iter().for_each(|header| out.extend(header.encode()));
    out
}

fn check_len(len: u64) -> Result<(), WriteError> {
    if len < NOTES_MAX { Ok(()) } else { Err(WriteError::NotesTooLong { len }) }
}

/// The manifest of these contents, not checked yet.
fn manifest(contents: &Contents, sections: &[&Section]) -> Manifest {
    let entry = |section: &&Section| SectionEntry {
        name: section.name.clone(),
        version: section.version,
        len: section.bytes.len() as u32,
        crc: crc32fast::hash(&section.bytes),
    };
    Manifest {
        about: contents.about.clone(),
        parent: contents.delta.map(|delta| delta.parent.generation),
        ram: RamFormat::of(contents.ram.ranges()),
        vcpus: u32::try_from(contents.vcpus.len()).unwrap_or(u32::MAX),
        sections: sections.iter().map(entry).collect(),
    }
}
