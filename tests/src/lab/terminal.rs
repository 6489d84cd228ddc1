//! The caller's terminal in raw mode.
//!
//! In: standard input, a terminal. Out: its size, and every key untouched. Holds: the terminal gets its mode back when
//! the guard is dropped and when SIGTERM or SIGHUP ends the process.

use anyhow::{Context, Result};
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// The mode before raw mode, where the signal handler finds it.
static COOKED: OnceLock<libc::termios> = OnceLock::new();

/// Raw mode, until it is dropped.
#[derive(Debug)]
pub(super) struct Raw;

impl Raw {
    pub(super) fn enter() -> Result<Raw> {
        let cooked = mode().context("cannot read the terminal's mode")?;
        let cooked = COOKED.get_or_init(|| cooked);
        restore_on(libc::SIGTERM);
        restore_on(libc::SIGHUP);
        let mut raw = *cooked;
        // SAFETY: `raw` is a valid termios of this frame.
        unsafe { libc::cfmakeraw(&mut raw) };
        set_mode(&raw).context("cannot set the terminal to raw mode")?;
        Ok(Raw)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Rows and columns of the terminal at standard input; `None` if it doesn't say.
pub(super) fn size() -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one winsize; zeroes are one too.
    let size = unsafe {
        let got = libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr());
        (got == 0).then(|| size.assume_init())
    };
    size.filter(|size| size.ws_row > 0 && size.ws_col > 0).map(|size| (size.ws_row, size.ws_col))
}

fn mode() -> io::Result<libc::termios> {
    let mut mode = MaybeUninit::uninit();
    // SAFETY: tcgetattr writes the whole termios when it returns 0.
    unsafe {
        match libc::tcgetattr(libc::STDIN_FILENO, mode.as_mut_ptr()) {
            0 => Ok(mode.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn set_mode(mode: &libc::termios) -> io::Result<()> {
    // SAFETY: `mode` is a valid termios.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Async-signal-safe: reads what was set before and calls tcsetattr. A terminal that is gone needs no mode.
fn restore() {
    if let Some(cooked) = COOKED.get() {
        let _ = set_mode(cooked);
    }
}

fn restore_on(signal: libc::c_int) {
    let handler: extern "C" fn(libc::c_int) = restore_and_exit;
    // SAFETY: the handler is async-signal-safe and has the signature that signal(2) asks for.
    unsafe { libc::signal(signal, handler as libc::sighandler_t) };
}

extern "C" fn restore_and_exit(signal: libc::c_int) {
    restore();
    // SAFETY: _exit takes a number and does not return. The emulator is killed by its parent-death signal.
    unsafe { libc::_exit(128 + signal) }
}
