//! The host's wall clock, set to make up a time that nobody has to wait for.
//!
//! In: seconds. Out: a clock that is off by so much. Holds: no clock but the lab's is ever set, and it is set right again.

use anyhow::{Context, Result, ensure};
use std::path::Path;

/// The lab's wall clock, off by some seconds for as long as this value lives.
pub(super) struct HostClock {
    shifted: i64,
}

impl HostClock {
    /// The clock, if this is the lab.
    ///
    /// # Errors
    /// It isn't.
    pub(super) fn of_the_lab() -> Result<Self> {
        ensure!(
            Path::new("/lab/settings").exists(),
            "this story sets the host's clock, and runs in the lab only"
        );
        Ok(Self { shifted: 0 })
    }

    /// Has the clock be off by so many seconds from what is right.
    ///
    /// # Errors
    /// It can't be set.
    pub(super) fn shift(&mut self, seconds: i64) -> Result<()> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is valid for writing.
        let read = unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut time) };
        time.tv_sec += seconds - self.shifted;
        // SAFETY: `time` is valid for reading.
        let set = if read == 0 { unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) } } else { read };
        if set != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot set the host's clock");
        }
        self.shifted = seconds;
        Ok(())
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        // The lab ends soon anyhow.
        let _ = self.shift(0);
    }
}
