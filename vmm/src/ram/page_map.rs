//! A process's memory, seen by system calls: which pages it has, and their bytes.
//!
//! In: addresses in that process. Out: what is there. Holds: what is gone is an error, where a load would be a SIGBUS: whoever may write
//! to a snapshot that RAM is mapped from can shorten it.

use super::RamError;
use crate::layout::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

pub(super) const SHORTENED: &str = "the file that it is mapped from was shortened meanwhile";
/// Why frozen RAM can't be read.
pub(crate) const GONE: &str =
    "the copy of this process that has it as it was is gone: the host may be short of memory";

/// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst): present, swapped out; a file's page; marked by a tracker.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
const MARKED: u64 = 1 << 57;
/// The swap type of a mark where there is no page at all. Who may not see swap types sees 0, and takes such a mark for a page.
const NO_PAGE: u64 = 0x1f;
/// Bytes of entries that are read at a time: for 32 MiB.
const ENTRIES: u64 = 64 << 10;

/// The memory of one process.
#[derive(Debug)]
pub(super) struct PageMap {
    /// A child's is opened with it. This process's own is opened when it is needed first, which is not on a restore's way to the first
    /// instruction.
    pagemap: OnceLock<File>,
    pub(super) mem: Arc<File>,
    /// Why a read fails.
    lost: &'static str,
}

impl PageMap {
    /// Of this process, or of a child of it.
    pub(super) fn open(process: Option<i32>) -> Result<Self, RamError> {
        let directory = process.map_or_else(|| "/proc/self".to_owned(), |id| format!("/proc/{id}"));
        let open = |file: &'static str, write| {
            let opened = File::options().read(true).write(write).open(format!("{directory}/{file}"));
            opened.map_err(|source| RamError::OwnMemory { path: format!("{directory}/{file}"), source })
        };
        let lost = if process.is_none() { SHORTENED } else { GONE };
        let pagemap = OnceLock::new();
        if process.is_some() {
            let _ = pagemap.set(open("pagemap", false)?);
        }
        Ok(Self { pagemap, mem: Arc::new(open("mem", process.is_none())?), lost })
    }

    fn pagemap(&self) -> io::Result<&File> {
        if let Some(open) = self.pagemap.get() {
            return Ok(open);
        }
        let opened = File::open("/proc/self/pagemap")?;
        Ok(self.pagemap.get_or_init(|| opened))
    }

    /// Whether the process has pages in the range.
    pub(super) fn has_pages(&self, host: u64, len: u64) -> io::Result<bool> {
        let mut found = false;
        self.each_entry(host, len, |_, entry| found |= is_here(entry))?;
        Ok(found)
    }

    /// Names the pages of the range that the process has, by their number in it.
    pub(super) fn each_page(&self, host: u64, len: u64, mut name: impl FnMut(u64)) -> io::Result<()> {
        self.each_entry(host, len, |page, entry| {
            if is_here(entry) {
                name(page);
            }
        })
    }

    /// How many pages of the range are the process's own, and no file's, be they present or swapped out.
    pub(super) fn pages_of_its_own(&self, host: u64, len: u64) -> io::Result<u64> {
        let mut pages = 0;
        self.each_entry(host, len, |_, entry| pages += u64::from(is_own(entry)))?;
        Ok(pages)
    }

    /// Names the pages of the range that are the process's own, by their numbers in it.
    pub(super) fn each_own_page(&self, host: u64, len: u64, mut name: impl FnMut(u64)) -> io::Result<()> {
        self.each_entry(host, len, |page, entry| {
            if is_own(entry) {
                name(page);
            }
        })
    }

    /// Names the pages of the range that have no mark of a tracker, by their numbers in it.
    pub(super) fn each_unmarked_page(
        &self,
        host: u64,
        len: u64,
        mut name: impl FnMut(u64),
    ) -> io::Result<()> {
        self.each_entry(host, len, |page, entry| {
            if entry & MARKED == 0 {
                name(page);
            }
        })
    }

    /// Shows each page's entry, with the page's number in the range.
    fn each_entry(&self, host: u64, len: u64, mut show: impl FnMut(u64, u64)) -> io::Result<()> {
        let pages = len / PAGE_SIZE;
        let pagemap = self.pagemap()?;
        let mut entries = vec![0u8; ENTRIES.min(pages * 8) as usize];
        let mut page = 0;
        while page < pages {
            let part = &mut entries[..(ENTRIES / 8).min(pages - page) as usize * 8];
            pagemap.read_exact_at(part, (host / PAGE_SIZE + page) * 8)?;
            let entries = part.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
            entries.zip(page..).for_each(|(entry, page)| show(page, entry));
            page += part.len() as u64 / 8;
        }
        Ok(())
    }

    pub(super) fn read(&self, host: u64, buf: &mut [u8]) -> io::Result<()> {
        self.mem.read_exact_at(buf, host).map_err(|_| io::Error::other(self.lost))
    }
}

fn is_here(entry: u64) -> bool {
    let only_marked = entry & MARKED != 0 && entry & NO_PAGE == NO_PAGE;
    entry & PRESENT != 0 || entry & SWAPPED != 0 && !only_marked
}

fn is_own(entry: u64) -> bool {
    is_here(entry) && entry & OF_A_FILE == 0
}
