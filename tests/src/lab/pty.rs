//! A pseudo-terminal in raw mode: a serial line between two processes.
//!
//! In: nothing. Out: its two ends. Holds: every byte passes unchanged in both directions; no child inherits an end
//! unless it is told to, so reading the near end fails with `EIO` once the last holder of the far end is gone.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub(super) struct Pty {
    /// This process's end.
    pub(super) near: File,
    /// The end that is a terminal.
    pub(super) far: File,
}

impl Pty {
    pub(super) fn open() -> io::Result<Pty> {
        let near =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/ptmx")?;
        unlock(&near)?;
        let far = far_end(&near)?;
        set_raw(&far)?;
        Ok(Pty { near, far })
    }
}

fn unlock(near: &File) -> io::Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which is on this frame.
    check(unsafe { libc::ioctl(near.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) }).map(|_| ())
}

fn far_end(near: &File) -> io::Result<File> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes the flags as a number; what it returns is a new descriptor that nobody else owns.
    unsafe {
        let fd = check(libc::ioctl(near.as_raw_fd(), libc::TIOCGPTPEER, flags))?;
        Ok(File::from_raw_fd(fd))
    }
}

/// Every byte is passed on as it is, and none is given back.
pub(super) fn set_raw(terminal: &File) -> io::Result<()> {
    let mut mode = MaybeUninit::uninit();
    // SAFETY: tcgetattr writes the whole termios when it returns 0; the others take that termios.
    unsafe {
        check(libc::tcgetattr(terminal.as_raw_fd(), mode.as_mut_ptr()))?;
        let mut mode = mode.assume_init();
        libc::cfmakeraw(&mut mode);
        check(libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &mode)).map(|_| ())
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn every_byte_passes_both_ways() {
        let Pty { mut near, mut far } = Pty::open().unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        let mut got = vec![0; bytes.len()];
        near.write_all(&bytes).unwrap();
        far.read_exact(&mut got).unwrap();
        assert_eq!(got, bytes);
        far.write_all(&bytes).unwrap();
        near.read_exact(&mut got).unwrap();
        assert_eq!(got, bytes);
    }
}
