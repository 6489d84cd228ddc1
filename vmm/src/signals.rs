//! The signals that ask the process to end, turned into something a loop can wait on.
//!
//! In: SIGINT, SIGTERM, SIGHUP. Out: a readable descriptor, so that the terminal, the API socket and half-written files
//! are put in order before the process ends. Holds: blocked before any thread starts, so no thread is killed by them; a
//! limit on a file's size (SIGXFSZ) fails the write and nothing else.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The ending signals, held back and queued on a signalfd.
#[derive(Debug)]
pub struct EndSignals(OwnedFd);

/// Has a write beyond the limit on a file's size fail with EFBIG, as any other write that finds no room.
pub fn let_long_writes_fail() {
    // SAFETY: to ignore a signal needs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

impl EndSignals {
    /// Holds the signals back in this thread and in every thread that it starts later.
    ///
    /// # Errors
    /// No descriptor was left.
    pub fn hold() -> io::Result<Self> {
        let set = ending_set();
        // SAFETY: `set` is a whole sigset, and the old one isn't asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` is a whole sigset; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, which nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Readable when a signal has come.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The number of the next signal that has come, if one has. Never waits.
    ///
    /// # Errors
    /// The descriptor could not be read.
    pub fn next(&self) -> io::Result<Option<i32>> {
        // SAFETY: signalfd_siginfo is plain numbers, for which zero is a value.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        // SAFETY: a signalfd writes one whole siginfo, and that is how long the buffer is.
        let count = unsafe { libc::read(self.fd(), (&raw mut info).cast(), size_of_val(&info)) };
        if count >= 0 {
            return Ok(Some(info.ssi_signo as i32));
        }
        match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            e => Err(e),
        }
    }
}

fn ending_set() -> libc::sigset_t {
    // SAFETY: sigemptyset makes the zeroed set a valid one; sigaddset changes nothing else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in ENDING {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_signal_is_read_and_kills_nobody() {
        let signals = EndSignals::hold().unwrap();
        assert_eq!(signals.next().unwrap(), None);
        // SAFETY: the signal goes to this thread, where it is blocked.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(signals.next().unwrap(), Some(libc::SIGTERM));
        assert_eq!(signals.next().unwrap(), None);
    }
}
