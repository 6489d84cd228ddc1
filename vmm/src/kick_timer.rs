//! A kick that comes by itself.
//!
//! In: how long the calling thread may be in its guest. Out: a kick of it, after that. Holds: it comes once, so whoever waits
//! for it forgets no kick afterwards; one that comes too late is one of those that nobody asked for, which change nothing.

use crate::vcpu::kick_signal;
use rustix::thread::gettid;
use std::io;
use std::mem::zeroed;
use std::ptr;
use std::time::Duration;

/// A kick of the thread that made it, unless it is dropped before (timer_create(2), `SIGEV_THREAD_ID`).
pub(crate) struct KickTimer(libc::timer_t);

impl KickTimer {
    /// Has the calling thread kicked once, `after` so long, which is less than a second.
    ///
    /// # Errors
    /// The host has no timer to give.
    pub(crate) fn start(after: Duration) -> io::Result<Self> {
        // SAFETY: plain numbers and pointers, for which zero is a value.
        let (mut event, mut timer): (libc::sigevent, libc::timer_t) = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        event.sigev_notify_thread_id = gettid().as_raw_nonzero().get();
        // SAFETY: both are whole, and live until the call is over.
        succeeded(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) })?;
        let timer = Self(timer);
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let once = libc::timespec { tv_nsec: after.subsec_nanos().into(), ..zero };
        let wish = libc::itimerspec { it_interval: zero, it_value: once };
        // SAFETY: the timer is this one's, the wish is whole, and what it was set to isn't asked for.
        succeeded(unsafe { libc::timer_settime(timer.0, 0, &wish, ptr::null_mut()) })?;
        Ok(timer)
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is this one's, and nobody uses it from now on.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn succeeded(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    /// The kick that came to this thread, which holds it back, within so long.
    fn kicked_within(time: Duration) -> bool {
        let wait = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        // SAFETY: the set is made by sigemptyset, and all of what is pointed to lives until the calls are over.
        unsafe {
            let mut set = zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, kick_signal());
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
            libc::sigtimedwait(&set, ptr::null_mut(), &wait) == kick_signal()
        }
    }

    #[test]
    fn a_kick_comes_once_unless_it_is_called_off() {
        assert!(!kicked_within(Duration::ZERO));
        let timer = KickTimer::start(SOON).unwrap();
        assert!(kicked_within(Duration::from_secs(60)) && !kicked_within(2 * SOON));
        drop((timer, KickTimer::start(Duration::from_millis(900)).unwrap()));
        assert!(!kicked_within(Duration::from_secs(1)));
    }
}
