//! RAM against its digests.
//!
//! In: a file, the place of a RAM range in it, the chunk table. Out: agreement, or the first chunk that differs. Holds:
//! one chunk is in memory at a time, and holes of the file are not read.

use crate::packed::Packed;
use crate::{CHUNK_SIZE, ChunkPlace, MappedRange, RamError, RamRange, chunk, seal};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

/// Chunks of a file, one at a time.
pub(crate) struct Chunks<'a> {
    file: &'a File,
    buf: Vec<u8>,
    /// The last hole seen. In a copy of `/proc/vmcore` ranges may lie in another order than in the guest, so it can be
    /// ahead.
    hole: Range<u64>,
}

impl<'a> Chunks<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, buf: vec![0; CHUNK_SIZE as usize], hole: 0..0 }
    }

    /// A chunk, or none if nothing is allocated there.
    pub(crate) fn read(&mut self, offset: u64, len: u64) -> io::Result<Option<&[u8]>> {
        if self.is_hole(offset, offset + len)? {
            return Ok(None);
        }
        let buf = &mut self.buf[..len as usize];
        self.file.read_exact_at(buf, offset)?;
        Ok(Some(buf))
    }

    /// Whether nothing is allocated from `start` to `end`.
    fn is_hole(&mut self, start: u64, end: u64) -> io::Result<bool> {
        if !self.hole.contains(&start) {
            self.hole = start..next_data(self.file, start)?;
        }
        Ok(end <= self.hole.end)
    }
}

/// A pass over all RAM ranges, in the order of the table.
pub(crate) struct RamCheck<'a> {
    path: &'a Path,
    chunks: Chunks<'a>,
    digests: std::slice::Iter<'a, u64>,
    /// Those of a seal, if it is to be believed.
    sealed: Option<std::slice::Iter<'a, seal::Digest>>,
    /// Where packed pages are in the guest, if the file has such.
    packed: Option<Packed<'a>>,
    pub(crate) hole_bytes: u64,
    done: u64,
}

impl<'a> RamCheck<'a> {
    pub(crate) fn new(
        path: &'a Path,
        file: &'a File,
        table: &'a [u64],
        sealed: Option<&'a [seal::Digest]>,
        packed: Option<Packed<'a>>,
    ) -> Self {
        let (chunks, digests, sealed) = (Chunks::new(file), table.iter(), sealed.map(<[_]>::iter));
        Self { path, chunks, digests, sealed, packed, hole_bytes: 0, done: 0 }
    }

    /// Checks one range; `progress` hears how many bytes are done.
    pub(crate) fn check_range(
        &mut self,
        mapped: &MappedRange,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), RamError> {
        for chunk in chunk::chunks(&[mapped.range]) {
            self.check_chunk(&chunk, mapped.offset + (chunk.gpa - mapped.range.gpa))?;
            self.done += chunk.len;
            progress(self.done);
        }
        Ok(())
    }

    fn check_chunk(&mut self, chunk: &RamRange, offset: u64) -> Result<(), RamError> {
        let len = chunk.len;
        let (path, place) = (|| self.path.to_owned(), || place(chunk, self.packed.as_ref()));
        let bytes = self.chunks.read(offset, len);
        let bytes = bytes.map_err(|source| RamError::Read { path: path(), chunk: place(), source })?;
        self.hole_bytes += bytes.map_or(len, |_| 0);
        let found = bytes.map_or_else(|| chunk::zero_digest(len), chunk::digest);
        let expected = *self.digests.next().expect("the table has a digest for each chunk");
        if found != expected {
            return Err(RamError::Digest { path: path(), chunk: place(), found, expected });
        }
        let sealed = self.sealed.as_mut().and_then(Iterator::next);
        if sealed.is_some_and(|expected| seal::digest(bytes, len) != *expected) {
            return Err(RamError::Seal { path: path(), chunk: place() });
        }
        Ok(())
    }
}

fn place(chunk: &RamRange, packed: Option<&Packed>) -> ChunkPlace {
    let gpa = packed.map_or(chunk.gpa, |packed| packed.gpa(chunk.gpa));
    ChunkPlace { gpa, len: chunk.len, packed: packed.is_some() }
}

/// Bytes of holes in this range of RAM.
pub(crate) fn hole_bytes(file: &File, mapped: &MappedRange) -> io::Result<u64> {
    let (mut at, end, mut holes) = (mapped.offset, mapped.offset + mapped.range.len, 0);
    while at < end {
        let data = next_data(file, at)?.min(end);
        holes += data - at;
        at = next_hole(file, data, end)?;
    }
    Ok(holes)
}

/// Where the next data is, from `start` on. A file system without `SEEK_DATA` has data everywhere; past the last data
/// the host says `ENXIO`, and so it does past the end of a file that was cut short meanwhile.
fn next_data(file: &File, start: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(start)) {
        Ok(data) => Ok(data.max(start)),
        Err(Errno::NXIO) => Ok(file.metadata()?.len().max(start)),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(start),
        Err(error) => Err(error.into()),
    }
}

/// Where the next hole is, after `start` and at `end` the latest. A file that was cut short ends in nothing but hole.
fn next_hole(file: &File, start: u64, end: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Hole(start)) {
        Ok(hole) if hole > start => Ok(hole.min(end)),
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(end),
        Err(error) => Err(error.into()),
    }
}
