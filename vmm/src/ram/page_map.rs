//! A process's pages, as the kernel tells of them: which it has, and which are its own.
//!
//! In: addresses in that process. Out: their pages' numbers. Holds: nothing is opened before it is needed, which is not on a restore's way to
//! the first instruction.

use super::page_scan;
use crate::layout::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// Bits of an entry's highest byte (Documentation/admin-guide/mm/pagemap.rst): present, swapped out; a file's page.
const HERE: u8 = 0b1100_0000;
const OF_A_FILE: u8 = 0b0010_0000;
/// Bytes of entries that are read at a time: for 32 MiB.
const ENTRIES: u64 = 64 << 10;

/// The pages of one process.
#[derive(Debug, Default)]
pub(super) struct PageMap {
    /// A child's is there from the start.
    pagemap: OnceLock<File>,
}

impl PageMap {
    /// Of the process whose map this is. Without one it is this process's.
    pub(super) fn of(pagemap: File) -> Self {
        Self { pagemap: pagemap.into() }
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
        self.each_entry(host, len, |_, entry| found |= entry & HERE != 0)?;
        Ok(found)
    }

    /// Names the pages of the range that the process has, by their number in it.
    pub(super) fn each_page(&self, host: u64, len: u64, mut name: impl FnMut(u64)) -> io::Result<()> {
        self.each_entry(host, len, |page, entry| {
            if entry & HERE != 0 {
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

    /// Names the pages of the range that are the process's own, by their numbers in it, some at a time. The huge page of zeroes, which is everybody's, is
    /// taken for its own.
    pub(super) fn each_own_run(
        &self,
        host: u64,
        len: u64,
        mut name: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let at = |address: u64| (address - host) / PAGE_SIZE;
        let scanned = |run: Range<u64>| name(at(run.start)..at(run.end));
        let reached = page_scan::each_own_run(self.pagemap()?, host..host + len, scanned);
        // Before Linux 6.7 each page has to be looked at.
        self.each_entry(reached, host + len - reached, |page, entry| {
            if is_own(entry) {
                name(at(reached) + page..at(reached) + page + 1);
            }
        })
    }

    /// Shows the highest byte of each page's entry, with the page's number in the range.
    fn each_entry(&self, host: u64, len: u64, mut show: impl FnMut(u64, u8)) -> io::Result<()> {
        let pages = len / PAGE_SIZE;
        let pagemap = self.pagemap()?;
        let mut entries = vec![0u8; ENTRIES.min(pages * 8) as usize];
        let mut page = 0;
        while page < pages {
            let part = &mut entries[..(ENTRIES / 8).min(pages - page) as usize * 8];
            pagemap.read_exact_at(part, (host / PAGE_SIZE + page) * 8)?;
            part.chunks_exact(8).zip(page..).for_each(|(entry, page)| show(page, entry[7]));
            page += part.len() as u64 / 8;
        }
        Ok(())
    }
}

fn is_own(entry: u8) -> bool {
    entry & HERE != 0 && entry & OF_A_FILE == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{FileRange, GuestRam};
    use vm_memory::{Bytes, GuestAddress};

    const LEN: u64 = 32 << 20;

    /// As both ways see it, the one that this host may not have only if it has. That one may see the huge page of zeroes too.
    fn own(ram: &GuestRam, pages: &PageMap) -> Vec<u64> {
        let host = ram.host_address(0, LEN).unwrap();
        let (mut looked, mut scanned, mut either) = (Vec::new(), Vec::new(), Vec::new());
        let look = |page, entry| looked.extend(is_own(entry).then_some(page));
        pages.each_entry(host, LEN, look).unwrap();
        let name =
            |run: Range<u64>| scanned.extend((run.start - host) / PAGE_SIZE..(run.end - host) / PAGE_SIZE);
        let reached = page_scan::each_own_run(pages.pagemap().unwrap(), host..host + LEN, name);
        assert!(reached == host + LEN || reached == host && scanned.is_empty());
        pages.each_own_run(host, LEN, |run| either.extend(run)).unwrap();
        assert!(either == scanned || scanned.is_empty());
        assert!(looked.iter().all(|page| either.binary_search(page).is_ok()));
        either
    }

    fn read_all(ram: &GuestRam) {
        let mut byte = [0];
        (0..LEN).step_by(4096).for_each(|gpa| ram.memory().read_slice(&mut byte, GuestAddress(gpa)).unwrap());
    }

    #[test]
    fn pages_of_a_file_are_nobodys_own_until_they_are_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        file.write_all_at(&vec![1; LEN as usize / 2], 0).unwrap();
        let ram = GuestRam::from_snapshot(file, &[FileRange { gpa: 0, len: LEN, offset: 0 }]).unwrap();
        let pages = PageMap::default();
        assert!(own(&ram, &pages).is_empty());
        read_all(&ram);
        assert!(own(&ram, &pages).is_empty());
        // More runs than are told of at a time.
        let written: Vec<u64> =
            (0..LEN / PAGE_SIZE).filter(|page| page % 3 == 0 || page % 2048 < 700).collect();
        written.iter().for_each(|page| ram.memory().write_obj(2u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        assert_eq!(own(&ram, &pages), written);
    }

    #[test]
    fn fresh_memory_is_ones_own_in_small_pages_and_in_huge_ones() {
        let ram = GuestRam::new(LEN).unwrap();
        let pages = PageMap::default();
        assert!(own(&ram, &pages).is_empty());
        ram.memory().write_obj(2u8, GuestAddress(5 << 20)).unwrap();
        assert!(own(&ram, &pages).contains(&(5 << 8)));
        read_all(&ram);
        own(&ram, &pages);
        ram.memory().write_slice(&vec![1; LEN as usize], GuestAddress(0)).unwrap();
        assert_eq!(own(&ram, &pages).len() as u64, LEN / PAGE_SIZE);
    }
}
