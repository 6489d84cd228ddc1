//! Tracking: the host marks each page of RAM that somebody writes to.
//!
//! In: RAM. Out: the same, protected: a page that is written to loses its mark, whoever writes. Holds: nobody waits for this process, the
//! kernel takes the mark off by itself (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7; Documentation/admin-guide/mm/userfaultfd.rst).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `UFFDIO_API`, `UFFDIO_REGISTER`, `UFFDIO_WRITEPROTECT` (`include/uapi/linux/userfaultfd.h`).
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const WRITE_PROTECT: libc::c_ulong = 0xc018_aa06;
/// The version of the interface.
const VERSION: u64 = 0xaa;
/// `UFFD_USER_MODE_ONLY`: what a user without privileges may have. No fault is ever handed to this process, so it makes no difference.
const USER_MODE_ONLY: libc::c_int = 1;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `UFFD_FEATURE_WP_UNPOPULATED`, `UFFD_FEATURE_WP_ASYNC`.
const FEATURES: u64 = 1 | 1 << 13 | 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`
const BY_WRITES: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`
const PROTECT: u64 = 1;

/// Marks pages. Dropped, the marks are gone.
#[derive(Debug)]
pub(super) struct Tracker(OwnedFd);

impl Tracker {
    /// # Errors
    /// A host that can't, or won't for this process.
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, which nobody else owns.
        let tracker = Self(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        tracker.ask(API, [VERSION, FEATURES, 0])?;
        Ok(tracker)
    }

    /// Marks every page of a range. What was put in its place since the last time is taken along.
    ///
    /// # Errors
    /// Memory of a kind that the host can't mark.
    pub(super) fn mark(&self, start: u64, len: u64) -> io::Result<()> {
        self.ask(REGISTER, [start, len, BY_WRITES, 0])?;
        self.ask(WRITE_PROTECT, [start, len, PROTECT])
    }

    fn ask<const N: usize>(&self, request: libc::c_ulong, mut words: [u64; N]) -> io::Result<()> {
        // SAFETY: the kernel reads and writes as many bytes as the request's number says, which are those of the words.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
