//! Memory that nobody has touched.
//!
//! In: a guest physical address and a length. Out: zeroed memory of this process. Holds: where the host allows, both addresses of a byte
//! are equally far from a multiple of a huge page, so that KVM maps such a page whole.

use super::{HUGE_PAGE, RamError, advise, builder, region};
use devices::MemoryRegion;

/// Zeroed memory that is this process's alone. With huge pages a copy of the process is made in a fraction of the time; KVM has them
/// too where both addresses are as far from a multiple of their size.
pub(crate) fn fresh(gpa: u64, len: u64) -> Result<MemoryRegion, RamError> {
    let place = || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        region(builder(len), flags, gpa, len)
    };
    let mut region = place()?;
    let over = (region.as_ptr() as u64).wrapping_sub(gpa) % HUGE_PAGE;
    if over != 0 && len >= HUGE_PAGE {
        let end = region.as_ptr() as u64 + len;
        drop(region);
        // Linux before 6.7 does not align by itself. It places a mapping as high as there is room for it, so with this filled
        // the next one ends below. If it doesn't, some time is lost, nothing else.
        let _filling = Filling::new(end - over, over);
        region = place()?;
    }
    advise(&region, libc::MADV_HUGEPAGE);
    Ok(region)
}

/// Addresses that are taken for a moment.
struct Filling(u64, u64);

impl Filling {
    /// Takes them, unless someone else has.
    fn new(start: u64, len: u64) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: the flags have the call fail rather than replace a mapping.
        let at = unsafe { libc::mmap(start as *mut _, len as usize, libc::PROT_NONE, flags, -1, 0) };
        // Linux before 4.17 takes the address for a wish.
        (at != libc::MAP_FAILED).then(|| Self(at as u64, len))
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has got its address.
        unsafe { libc::munmap(self.0 as *mut _, self.1 as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests' threads map memory as well, so that one may come between, or leave a gap of just this size; which is then taken.
    #[test]
    fn huge_pages_are_the_guests_too() {
        for len in [HUGE_PAGE, 3 * HUGE_PAGE, (64 << 20) + 4096] {
            let mut taken = Vec::new();
            let mut aligned = || {
                taken.push(fresh(4 << 30, len).unwrap());
                taken.last().is_some_and(|last| (last.as_ptr() as u64).is_multiple_of(HUGE_PAGE))
            };
            assert!((0..16).any(|_| aligned()), "{len:#x}");
        }
    }
}
