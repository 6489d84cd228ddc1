//! Writing a snapshot.
//!
//! In: [`Contents`] and a path. Out: the file, and a [`Summary`]. Holds: RAM is read once; the length of the notes follows from the layout
//! alone, so their place is kept free until the digests are known.

use crate::notes::{self, Notes};
use crate::packed::PackedRam;
use crate::publish::{NewFile, PublishError};
use crate::ram_writer::{self, RamFailure, Written};
use crate::seal::{self, Seal, SealKey};
use crate::{
    About, Delta, ManifestError, NOTES_MAX, RamRange, Registers, Section, SectionError, chunk, delta,
};
use snapshot_format::{Layout, elf, note};
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

    /// Fills `buf` with the RAM at `gpa`: pages that changed, of one range, and no more than a chunk has.
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
    /// As in [`crate::Parent`].
    pub ram_digest: u64,
    /// Time to read, digest and write RAM.
    pub ram_time: Duration,
    /// Time to write the notes, sync, and rename.
    pub publish_time: Duration,
}

impl Summary {
    /// Bytes of guest RAM in zero pages, which take no room, or in pages that are a parent's.
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
/// many bytes of RAM are done and how many are to be written.
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
    let changed = contents.delta.map(|delta| &delta.changed);
    let packed = changed.map(|changed| PackedRam::new(contents.ram, changed));
    let ram: &dyn RamSource = packed.as_ref().map_or(contents.ram, |packed| packed);
    let notes = Notes::new(contents, chunk::count(ram.ranges()))?;
    let seal_len = key.map_or(0, |_| note::note_len(note::VMMSNAP, Seal::len(notes.chunks)));
    notes::check_len(notes.len() + seal_len)?;
    let layout = plan(ram.ranges(), packed.is_some(), notes.len() + seal_len);
    let new = NewFile::create(path)?;
    let failed = |source| WriteError::Write { path: new.target().to_owned(), source };
    // First the length, so that a limit on it shows before the work is done; holes stay where nothing is written.
    new.file().set_len(layout.end()).map_err(failed)?;
    let started = Instant::now();
    let in_guest = |at| packed.as_ref().map_or(at, |ram| ram.packed.gpa(at));
    let Written { digests, data_bytes } = ram_writer::write(new.file(), layout.ram(), ram, progress)
        .map_err(|failure| match failure {
            RamFailure::Read { gpa, source } => WriteError::Ram { gpa: in_guest(gpa), source },
            RamFailure::Write(source) => failed(source),
        })?;
    contents.ram.finish().map_err(|source| WriteError::Ram { gpa: 0, source })?;
    let (ram_time, started) = (started.elapsed(), Instant::now());
    let ram_digest = delta::ram_digest(&digests, changed);
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
    let ram_bytes = contents.ram.ranges().iter().map(|range| range.len).sum();
    let (file_len, vmcoreinfo) = (layout.end(), contents.vmcoreinfo.is_some());
    Ok(Summary { ram_bytes, data_bytes, file_len, allocated, vmcoreinfo, ram_digest, ram_time, publish_time })
}

fn plan(ranges: &[RamRange], packed: bool, notes_len: u64) -> Layout {
    match ranges {
        [all] if packed => Layout::plan_packed(all.len, notes_len),
        _ => Layout::plan(ranges, notes_len),
    }
}

/// The ELF header and program headers of a planned file.
fn encode_headers(layout: &Layout) -> Vec<u8> {
    let headers: Vec<_> = layout.headers().collect();
    let mut out = elf::encode_header(headers.len() as u16).to_vec();
    headers.iter().for_each(|header| out.extend(header.encode()));
    out
}
