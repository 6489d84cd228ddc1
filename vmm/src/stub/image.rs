//! The snapshot as the stub sees it.
//!
//! In: an open file. Out: its bytes, mapped read-only, and a map of its holes. Holds: the file is not read here; a hole that
//! is filled meanwhile makes a digest wrong, and one that is dug later reads as zeroes.

use super::StubError;
use crate::layout::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

/// A snapshot file, mapped.
#[derive(Debug)]
pub struct ImageMapping {
    /// None for a file without bytes, which can't be mapped.
    region: Option<MmapRegion>,
    file: File,
    len: u64,
    holes: Vec<u8>,
}

impl ImageMapping {
    /// Maps a whole file.
    ///
    /// # Errors
    /// A file that is too long for any host, can't be mapped, or whose holes can't be found.
    pub fn new(file: &File) -> Result<Self, StubError> {
        let len = file.metadata().map_err(StubError::Image)?.len();
        let max = restore_stub::abi::IMAGE_MAX;
        if len > max {
            return Err(StubError::TooLong { len, max });
        }
        let holes = holes(file, len).map_err(StubError::Image)?;
        let region = if len == 0 { None } else { Some(map(file, len).map_err(StubError::Image)?) };
        let file = file.try_clone().map_err(StubError::Image)?;
        Ok(Self { region, file, len, holes })
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is in this process, and its length in whole pages; what follows the file in its last page is zero.
    pub(super) fn region(&self) -> Option<(u64, u64)> {
        let region = self.region.as_ref()?;
        Some((region.as_ptr() as u64, self.len.next_multiple_of(PAGE_SIZE)))
    }

    /// The parts of a range that are no hole, as far as is known; the range begins with a page.
    pub(super) fn data(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let page = |at: u64| at / PAGE_SIZE * PAGE_SIZE;
        let is_hole = |at: u64| {
            let byte = self.holes.get((at / PAGE_SIZE / 8) as usize);
            byte.is_some_and(|byte| byte >> (at / PAGE_SIZE % 8) & 1 == 1)
        };
        let mut at = page(range.start);
        std::iter::from_fn(move || {
            let mut pages = (at..range.end).step_by(PAGE_SIZE as usize);
            let start = pages.find(|at| !is_hole(*at))?;
            at = pages.find(|at| is_hole(*at)).unwrap_or(range.end);
            Some(start..at)
        })
    }

    /// Reads bytes that are in the page cache or on the disk.
    pub(super) fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    /// A bit for each page of the file, the lowest of a byte first: 1 where the file has nothing but a hole.
    pub(super) fn holes(&self) -> &[u8] {
        &self.holes
    }
}

fn map(file: &File, len: u64) -> io::Result<MmapRegion> {
    let builder = MmapRegionBuilder::new(len as usize)
        .with_file_offset(FileOffset::new(file.try_clone()?, 0))
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_SHARED);
    builder.build().map_err(io::Error::other)
}

/// Goes from hole to data and on (`lseek(2)`, `SEEK_HOLE`, `SEEK_DATA`). Pages that are partly a hole are data.
fn holes(file: &File, len: u64) -> io::Result<Vec<u8>> {
    let pages = len.div_ceil(PAGE_SIZE);
    let mut map = vec![0u8; pages.div_ceil(8) as usize];
    let mut at = 0;
    while at < len {
        let start = seek(file, at, libc::SEEK_HOLE)?.unwrap_or(len);
        let end = seek(file, start, libc::SEEK_DATA)?.unwrap_or(len).min(len);
        for page in start.div_ceil(PAGE_SIZE)..end / PAGE_SIZE {
            map[(page / 8) as usize] |= 1 << (page % 8);
        }
        at = end.max(at + 1);
    }
    Ok(map)
}

/// `None` where there is nothing more of that kind.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the fd is open; the call moves only its offset, which nothing here uses.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_found_by_whole_pages() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * PAGE_SIZE).unwrap();
        for page in [0, 9] {
            file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
        }
        let image = ImageMapping::new(&file).unwrap();
        assert_eq!(image.holes(), [0b1111_1110, 0b1111_1101]);
        assert_eq!((image.len(), image.region().unwrap().1), (16 * PAGE_SIZE, 16 * PAGE_SIZE));
    }

    #[test]
    fn what_is_no_hole_is_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * PAGE_SIZE).unwrap();
        for page in [0, 9, 10] {
            file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
        }
        let image = ImageMapping::new(&file).unwrap();
        let pages = |range: Range<u64>| {
            let data = image.data(range.start * PAGE_SIZE..range.end * PAGE_SIZE);
            data.map(|run| (run.start / PAGE_SIZE, run.end / PAGE_SIZE)).collect::<Vec<_>>()
        };
        assert_eq!(pages(0..16), [(0, 1), (9, 11)]);
        assert_eq!(pages(1..10), [(9, 10)]);
        assert_eq!(pages(1..9), []);
    }

    #[test]
    fn an_empty_file_has_no_place() {
        let image = ImageMapping::new(&tempfile::tempfile().unwrap()).unwrap();
        assert!(image.is_empty() && image.region().is_none() && image.holes().is_empty());
    }
}
