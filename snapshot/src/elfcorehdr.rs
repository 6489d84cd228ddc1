//! A machine as a second kernel is shown it: the ELF headers and notes from which Linux makes `/proc/vmcore`.
//!
//! In: [`Contents`], and where in the second kernel's memory they and RAM will lie. Out: bytes for its `elfcorehdr=`. Holds: what
//! Linux makes of them is a snapshot, with the same notes and the same RAM.
//!
//! ```text
//!  at         ┌──────────────────────────────────────┐
//!             │ ELF header, program headers          │  p_offset: addresses in the second kernel's memory
//!  at + page  ├──────────────────────────────────────┤
//!             │ notes, a zeroed note header after    │
//!  window     ├──────────────────────────────────────┤
//!             │ RAM, each range at window + its GPA  │  p_paddr: the machine's own addresses
//!             └──────────────────────────────────────┘
//! ```

use crate::notes::Notes;
use crate::{CHUNK_SIZE, ChunkContent, Contents, PAGE_SIZE, RamRange, RamSource, WriteError, chunk};
use snapshot_format::{Layout, elf};

/// Bytes of a zeroed note header, at which Linux stops reading notes.
const STOP: u64 = 12;

/// What a second kernel finds at its `elfcorehdr=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elfcorehdr {
    /// The bytes, whole pages.
    pub bytes: Vec<u8>,
    /// How long the second kernel's `/proc/vmcore` will be.
    pub vmcore_len: u64,
}

impl Elfcorehdr {
    /// Headers and notes for a kernel that will see them at `at` in its memory, and RAM at `window` and up. Reads all RAM, for
    /// its digests.
    ///
    /// # Errors
    /// RAM can't be read, or what there is to be told contradicts itself or is too long.
    pub fn new(contents: &Contents, at: u64, window: u64) -> Result<Self, WriteError> {
        let ranges = contents.ram.ranges();
        let notes = Notes::new(contents, chunk::count(ranges))?;
        let layout = Layout::plan(ranges, notes.len());
        let notes_len = (notes.len() + STOP).next_multiple_of(PAGE_SIZE);
        let headers: Vec<_> = layout
            .headers()
            .map(|header| match header.kind {
                elf::PT_NOTE => elf::ProgramHeader { offset: at + PAGE_SIZE, memsz: notes_len, ..header },
                _ => elf::ProgramHeader { offset: window + header.paddr, ..header },
            })
            .collect();
        let mut bytes = elf::encode_header(headers.len() as u16).to_vec();
        headers.iter().for_each(|header| bytes.extend(header.encode()));
        bytes.resize(PAGE_SIZE as usize, 0);
        bytes.extend(notes.encode(&digests(contents.ram)?));
        bytes.resize((PAGE_SIZE + notes_len) as usize, 0);
        let ram: u64 = ranges.iter().map(|range| range.len).sum();
        let vmcore_len = PAGE_SIZE + notes.len().next_multiple_of(PAGE_SIZE) + ram;
        Ok(Self { bytes, vmcore_len })
    }
}

fn digests(ram: &dyn RamSource) -> Result<Vec<u64>, WriteError> {
    let mut buf = vec![0; CHUNK_SIZE as usize];
    chunk::chunks(ram.ranges()).map(|chunk| digest(ram, &chunk, &mut buf)).collect()
}

fn digest(ram: &dyn RamSource, chunk: &RamRange, buf: &mut [u8]) -> Result<u64, WriteError> {
    let buf = &mut buf[..chunk.len as usize];
    match ram.read_chunk(chunk.gpa, buf) {
        Ok(ChunkContent::Zero) => Ok(chunk::zero_digest(chunk.len)),
        Ok(ChunkContent::Data) => Ok(chunk::digest(buf)),
        Err(source) => Err(WriteError::Ram { gpa: chunk.gpa, source }),
    }
}
