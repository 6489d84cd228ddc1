//! Which pages of a range are a process's own, without a look at those that are not there.
//!
//! In: a process's pagemap, addresses in that process. Out: runs of its own pages, in order. Holds: all is told that the
//! entries of the pagemap would tell, one by one, and the huge page of zeroes besides; a host that can't tell it this way (before Linux 6.7) tells nothing.

use crate::layout::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst): `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 3 << 30 | (size_of::<ScanArg>() as u64) << 16 | (b'f' as u64) << 8 | 16;
/// Categories of pages (Linux `uapi/linux/fs.h`).
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Runs that are told of at a time: as many as the kernel gathers at a time itself.
const RUNS: usize = 512;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96);

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Names the runs of pages in these addresses, whole pages, that are present or swapped out, and no file's. Returns how far it came: to
/// the end, or to where the host would tell no more.
pub(super) fn each_own_run(pagemap: &File, addresses: Range<u64>, mut name: impl FnMut(Range<u64>)) -> u64 {
    let mut found = [PageRegion::default(); RUNS];
    let mut at = addresses.start;
    while at < addresses.end {
        let Ok((count, reached)) = scan(pagemap, at..addresses.end, &mut found) else { break };
        found[..count].iter().for_each(|run| name(run.start..run.end));
        at = reached;
    }
    at
}

/// Fills in as many runs as there is room for; returns how many these are, and how far it came.
fn scan(pagemap: &File, addresses: Range<u64>, found: &mut [PageRegion]) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start: addresses.start,
        end: addresses.end,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        category_inverted: PAGE_IS_FILE,
        category_mask: PAGE_IS_FILE,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_FILE,
        ..ScanArg::default()
    };
    // SAFETY: the kernel reads and writes one whole argument of the size that it is told, and writes at most `vec_len` runs at `vec`.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let sound = |runs: &[PageRegion]| {
        let mut end = addresses.start;
        runs.iter().all(|run| {
            let in_order = end <= run.start && run.start < run.end && run.start.is_multiple_of(PAGE_SIZE);
            end = run.end;
            in_order && end <= arg.walk_end
        })
    };
    let went_on = addresses.start < arg.walk_end && arg.walk_end <= addresses.end;
    match found.get(..count) {
        Some(runs) if went_on && sound(runs) => Ok((count, arg.walk_end)),
        _ => Err(io::Error::other("the host tells of pages that were not asked for")),
    }
}
