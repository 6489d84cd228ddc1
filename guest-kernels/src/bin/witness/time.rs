//! The clock and an interval timer.
//!
//! In: CLOCK_MONOTONIC and a timerfd on it. Out: what went backwards, or stopped. Holds: the timer's expirations are as
//! many as the clock says, however long the machine lay in a file in between.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

const NANOS: u64 = 1_000_000_000;
const INTERVAL: u64 = NANOS / 100;
/// The count and the clock are not read at the same moment.
const SLACK: u64 = 2;
/// A timer of 10 ms that says nothing for so long has been lost.
const PATIENCE_MS: i32 = 10_000;
/// How often the clock is read for one check.
const READINGS: u32 = 1000;

/// CLOCK_MONOTONIC, with the latest reading.
#[derive(Default)]
pub(crate) struct Clock {
    latest: u64,
}

impl Clock {
    /// The time in nanoseconds, which must not be before any earlier reading.
    fn read(&mut self) -> Result<u64, String> {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is valid for writing, and the clock always exists.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
        self.advance(now.tv_sec as u64 * NANOS + now.tv_nsec as u64)
    }

    fn advance(&mut self, now: u64) -> Result<u64, String> {
        if now < self.latest {
            return Err(format!("CLOCK_MONOTONIC went back from {} ns to {now} ns", self.latest));
        }
        self.latest = now;
        Ok(now)
    }

    /// Reads the clock many times in a row.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        (0..READINGS).try_for_each(|_| self.read().map(drop))
    }
}

/// An interval timer, and the expirations counted since it was started.
pub(crate) struct Timer {
    file: File,
    started: u64,
    expirations: u64,
}

impl Timer {
    pub(crate) fn start(clock: &mut Clock) -> Result<Timer, String> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(format!("no timerfd: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        let started = clock.read()?;
        // Not from when it is set: a busy host may let that wait.
        let first = started + INTERVAL;
        let setting = libc::itimerspec { it_interval: timespec(INTERVAL), it_value: timespec(first) };
        // SAFETY: `setting` is valid for reading, and a null pointer for the old setting is allowed.
        if unsafe { libc::timerfd_settime(fd, libc::TFD_TIMER_ABSTIME, &setting, std::ptr::null_mut()) } != 0
        {
            return Err(format!("the timerfd can't be set: {}", std::io::Error::last_os_error()));
        }
        Ok(Timer { file, started, expirations: 0 })
    }

    /// Waits for an expiration and compares the sum of all with the clock.
    pub(crate) fn check(&mut self, clock: &mut Clock) -> Result<(), String> {
        let before = clock.read()?;
        self.wait()?;
        let mut count = [0; 8];
        self.file.read_exact(&mut count).map_err(|e| format!("the timerfd can't be read: {e}"))?;
        self.expirations += u64::from_ne_bytes(count);
        plausible(self.expirations, before - self.started, clock.read()? - self.started)
    }

    fn wait(&self) -> Result<(), String> {
        let mut wanted = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is passed, valid for reading and writing.
        match unsafe { libc::poll(&mut wanted, 1, PATIENCE_MS) } {
            1 => Ok(()),
            _ => Err(format!("the timer has not expired for {PATIENCE_MS} ms")),
        }
    }
}

fn timespec(nanos: u64) -> libc::timespec {
    libc::timespec { tv_sec: (nanos / NANOS) as i64, tv_nsec: (nanos % NANOS) as i64 }
}

/// Whether so many expirations fit a count taken between these two times since the start, in nanoseconds.
fn plausible(expirations: u64, before: u64, after: u64) -> Result<(), String> {
    let (fewest, most) = ((before / INTERVAL).saturating_sub(SLACK), after / INTERVAL + SLACK);
    if (fewest..=most).contains(&expirations) {
        return Ok(());
    }
    Err(format!("the timer expired {expirations} times, the clock says {fewest} to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_goes_back_is_noticed() {
        let mut clock = Clock::default();
        assert_eq!(clock.advance(5), Ok(5));
        assert_eq!(clock.advance(5), Ok(5));
        assert!(clock.advance(4).is_err());
    }

    #[test]
    fn a_timer_must_keep_step_with_the_clock() {
        assert_eq!(plausible(100, 100 * INTERVAL, 101 * INTERVAL), Ok(()));
        assert!(plausible(90, 100 * INTERVAL, 101 * INTERVAL).is_err());
        assert!(plausible(110, 100 * INTERVAL, 101 * INTERVAL).is_err());
    }

    #[test]
    fn a_real_timer_passes() {
        let mut clock = Clock::default();
        let mut timer = Timer::start(&mut clock).unwrap();
        for _ in 0..3 {
            assert_eq!(timer.check(&mut clock), Ok(()));
        }
    }
}
