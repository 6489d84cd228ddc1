//! RAM against its digests.
//!
//! In: a file, the place of a RAM range in it, the chunk table. Out: agreement, or the first chunk that differs. Holds:
//! one chunk is in memory at a time, and holes of the file are not read.

use crate::{CHUNK_SIZE, MappedRange, RamError, RamRange, chunk};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

/// A pass over all RAM ranges, in the order of the table.
pub(crate) struct RamCheck<'a> {
    path: &'a Path,
    file: &'a File,
    digests: std::slice::Iter<'a, u64>,
    buf: Vec<u8>,
    /// The last hole seen. In a copy of `/proc/vmcore` ranges may lie in another order than in the guest, so it can be
    /// ahead.
    hole: Range<u64>,
    pub(crate) hole_bytes: u64,
    done: u64,
}

impl<'a> RamCheck<'a> {
    pub(crate) fn new(path: &'a Path, file: &'a File, table: &'a [u64]) -> Self {
        let buf = vec![0; CHUNK_SIZE as usize];
        Self { path, file, digests: table.iter(), buf, hole: 0..0, hole_bytes: 0, done: 0 }
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
        let RamRange { gpa, len } = *chunk;
        let found = self.digest(offset, len);
        let found = found.map_err(|source| RamError::Read { path: self.path.to_owned(), gpa, source })?;
        let expected = *self.digests.next().expect("the table has a digest for each chunk");
        if found == expected {
            return Ok(());
        }
        Err(RamError::Digest { path: self.path.to_owned(), gpa, len, found, expected })
    }

    fn digest(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        if self.is_hole(offset, offset + len)? {
            self.hole_bytes += len;
            return Ok(chunk::zero_digest(len));
        }
        let buf = &mut self.buf[..len as usize];
        self.file.read_exact_at(buf, offset)?;
        Ok(chunk::digest(buf))
    }

    /// Whether nothing is allocated from `start` to `end`.
    fn is_hole(&mut self, start: u64, end: u64) -> io::Result<bool> {
        if !self.hole.contains(&start) {
            self.hole = start..next_data(self.file, start)?;
        }
        Ok(end <= self.hole.end)
    }
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
