//! RAM of a snapshot, fetched ahead.
//!
//! In: ranges of guest RAM that is mapped from a file. Out: their pages in the page cache, mapped; or which pages a guest has used. Holds:
//! what is fetched is the file's and stays everybody's; nothing here is written to.

use super::{GuestRam, PAGE_SIZE};
use snapshot::RamRange;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Bytes that are asked for at once: the host reads no more for one request, whatever it was asked for.
const REQUEST: u64 = 128 << 10;

impl GuestRam {
    /// Has every page read from its file only when it is used, and by itself, so that it can be told which are used. What others don't use now
    /// is dropped from the page cache first, of the first file of a chain. Does nothing to RAM that is no snapshot's.
    pub fn read_singly(&self) {
        for region in self.memory.iter() {
            let Some(behind) = region.file_offset() else { continue };
            // SAFETY: neither call changes a byte; the range is the region's mapping, and the file is open.
            unsafe {
                libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_RANDOM);
                let (start, len) = (behind.start() as i64, region.len() as i64);
                libc::posix_fadvise(behind.file().as_raw_fd(), start, len, libc::POSIX_FADV_DONTNEED);
            }
        }
    }

    /// The pages that this process has of a snapshot's RAM, in the order of guest addresses, with gaps of up to `gap` bytes taken along.
    ///
    /// # Errors
    /// The host doesn't tell.
    pub fn used(&self, gap: u64) -> io::Result<Vec<RamRange>> {
        let mut used: Vec<RamRange> = Vec::new();
        for region in self.memory.iter().filter(|_| self.is_mapped()) {
            let start = region.start_addr().0;
            self.pages.each_page(region.as_ptr() as u64, region.len(), |page| {
                let gpa = start + page * PAGE_SIZE;
                match used.last_mut() {
                    Some(last) if last.gpa >= start && gpa - (last.gpa + last.len) <= gap => {
                        last.len = gpa + PAGE_SIZE - last.gpa;
                    }
                    _ => used.push(RamRange { gpa, len: PAGE_SIZE }),
                }
            })?;
        }
        Ok(used)
    }

    /// Has the host begin to read a range of a snapshot's RAM, from whichever files it is mapped. It is no error if it doesn't.
    pub fn ask_for(&self, range: &RamRange) {
        let Some(host) = self.host_address(range.gpa, range.len) else { return };
        for at in (0..range.len).step_by(REQUEST as usize) {
            let len = REQUEST.min(range.len - at) as usize;
            // SAFETY: the range lies in mappings of this RAM; the call changes nothing but what is in the page cache.
            unsafe { libc::madvise((host + at) as *mut _, len, libc::MADV_WILLNEED) };
        }
    }

    /// Waits until a range is read, and maps it as if it had been read from. It is no error if the host can't (before Linux 5.14), or
    /// if the file has lost it.
    pub fn map_ahead(&self, range: &RamRange) {
        if let Some(host) = self.host_address(range.gpa, range.len) {
            // SAFETY: the range lies in a mapping of this RAM, and reading changes no byte of it.
            unsafe { libc::madvise(host as *mut _, range.len as usize, libc::MADV_POPULATE_READ) };
        }
    }
}
