//! The snapshot that RAM is mapped from, below what was written since.
//!
//! In: ranges of guest RAM. Out: what the files have there. Holds: they are read by system calls, so that a file that lost bytes is an error; a range
//! of which nothing is mapped any more, because the guest gave it up, is the caller's to know.

use super::{GuestRam, outside, shortened};
use crate::layout::PAGE_SIZE;
use snapshot::PageSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

impl GuestRam {
    /// Whether a range may be anything but zero in the snapshot.
    ///
    /// # Errors
    /// An address outside RAM, or a snapshot that lost its end.
    pub(crate) fn origin_has_data(&self, gpa: u64, len: u64) -> io::Result<bool> {
        let (region, start) = self.memory.to_region_addr(GuestAddress(gpa)).ok_or_else(|| outside(gpa))?;
        match region.file_offset() {
            _ if self.is_layered(gpa..gpa + len) => Ok(true),
            Some(behind) => holds_data(behind.file(), behind.start() + start.0, len),
            None => Ok(false),
        }
    }

    /// Reads what the snapshot has.
    ///
    /// # Errors
    /// As [`GuestRam::origin_has_data`].
    pub(crate) fn read_origin(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        let (region, start) = self.memory.to_region_addr(GuestAddress(gpa)).ok_or_else(|| outside(gpa))?;
        let Some(behind) = region.file_offset() else {
            buf.fill(0);
            return Ok(());
        };
        let read =
            |file: &File, part: &mut [u8], offset| file.read_exact_at(part, offset).map_err(|_| shortened());
        read(behind.file(), buf, behind.start() + start.0)?;
        let end = gpa + buf.len() as u64;
        self.layers_in(gpa..end).try_for_each(|layer| {
            let (from, to) = (layer.gpas.start.max(gpa), layer.gpas.end.min(end));
            let part = &mut buf[(from - gpa) as usize..(to - gpa) as usize];
            read(&layer.file, part, layer.offset + (from - layer.gpas.start))
        })
    }

    /// Memory of this process of the same shape, in which nothing is. In small pages: one that is put there takes no more than that.
    pub(crate) fn empty_one(&self) -> Result<Self, super::RamError> {
        let regions = self.memory.iter().map(|region| super::fresh(region.start_addr().0, region.len()));
        let memory = super::collect(regions.collect::<Result<_, _>>()?)?;
        memory.iter().for_each(|region| super::advise(region, libc::MADV_NOHUGEPAGE));
        Ok(Self::of(memory, super::Kind::Fresh))
    }

    /// Guest addresses and lengths of runs of these pages.
    pub(crate) fn runs<'a>(&'a self, pages: &'a PageSet) -> impl Iterator<Item = (u64, u64)> + 'a {
        let mut first = 0;
        self.memory.iter().flat_map(move |region| {
            let (of, start) = (first..first + region.len() / PAGE_SIZE, region.start_addr().0);
            first = of.end;
            let place = move |run: Range<u64>| {
                (start + (run.start - of.start) * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE)
            };
            pages.runs(first - region.len() / PAGE_SIZE..first).map(place)
        })
    }
}

/// Whether the file has anything but a hole in the range (`lseek(2)`, `SEEK_DATA`). Past its end there is no hole, though
/// `lseek` answers alike: bytes are missing.
fn holds_data(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    // SAFETY: the fd is open; the call moves only its offset, which nothing here uses.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, libc::SEEK_DATA) };
    if found >= 0 {
        return Ok((found as u64) < offset + len);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
        _ if file.metadata()?.len() < offset + len => Err(shortened()),
        _ => Ok(false),
    }
}
