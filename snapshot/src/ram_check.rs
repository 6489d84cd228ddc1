//! RAM against its digests.
//!
//! In: a file, the place of a RAM range in it, the chunk table. Out: agreement, or the first chunk that differs. Holds:
//! a part of a chunk is in memory at a time, and holes of the file are not read.

use crate::packed::Packed;
use crate::{ChunkPlace, MappedRange, RamError, RamRange, chunk, seal};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

/// Bytes that are in memory at a time: a chunk would be a fifth of all the memory that a monitor has.
const PIECE: usize = 128 << 10;

/// Chunks of a file, one after another.
pub(crate) struct Chunks<'a> {
    file: &'a File,
    buf: Vec<u8>,
    /// The last hole seen. In a copy of `/proc/vmcore` ranges may lie in another order than in the guest, so it can be
    /// ahead.
    hole: Range<u64>,
}

impl<'a> Chunks<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, buf: vec![0; PIECE], hole: 0..0 }
    }

    /// `take`s a chunk in pieces, or says that nothing is allocated there: `false`.
    pub(crate) fn read(&mut self, offset: u64, len: u64, take: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
        let (mut at, end) = (offset, offset + len);
        if self.is_hole(at, end)? {
            return Ok(false);
        }
        while at < end {
            let piece = &mut self.buf[..PIECE.min((end - at) as usize)];
            self.file.read_exact_at(piece, at)?;
            take(piece);
            at += piece.len() as u64;
        }
        Ok(true)
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
        let (path, place) = (|| self.path.to_owned(), || place(chunk, self.packed.as_ref()));
        let (mut digest, mut seal) =
            (chunk::Digest::default(), self.sealed.is_some().then(seal::Hasher::default));
        let has_data = self.chunks.read(offset, chunk.len, &mut |piece| {
            digest.update(piece);
            seal.iter_mut().for_each(|seal| seal.update(piece));
        });
        let has_data = has_data.map_err(|source| RamError::Read { path: path(), chunk: place(), source })?;
        self.hole_bytes += if has_data { 0 } else { chunk.len };
        let found = if has_data { digest.value() } else { chunk::zero_digest(chunk.len) };
        let expected = *self.digests.next().expect("the table has a digest for each chunk");
        if found != expected {
            return Err(RamError::Digest { path: path(), chunk: place(), found, expected });
        }
        let seal = seal.map(|seal| if has_data { seal.digest() } else { seal::zero_digest(chunk.len) });
        if seal.as_ref() != self.sealed.as_mut().and_then(Iterator::next) {
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
