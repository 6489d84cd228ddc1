//! The guest's serial console on the process's standard input, and the terminal it may be.
//!
//! In: bytes typed or piped in. Out: bytes for the guest, and an [`Action`] for each escape sequence. Holds: a terminal
//! put in raw mode is given back on every way out, and standard input's open file description is left as it was found
//! (no `O_NONBLOCK`, which a shell would inherit).
//!
//! ```text
//! stdin ──read──► Escape (terminals only) ──► queue ──take(room)──► serial device
//!                    └──► Action: end, status, help
//! ```

use crate::{complaint, lost_ram};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, Once, PoisonError};

/// The byte that starts an escape sequence: Ctrl-A, as in QEMU.
pub const ESCAPE_KEY: u8 = 0x01;
/// Printed on standard error when a VM starts on a terminal.
pub const HINT: &str = "Console: Ctrl-A x ends the VM, Ctrl-A h lists the other keys.";
/// What [`Action::Help`] prints.
pub const HELP: &str = "\
Ctrl-A x   end the VM
Ctrl-A s   print the VM's state
Ctrl-A a   send Ctrl-A to the guest (so does Ctrl-A Ctrl-A)
Ctrl-A h   this help";

/// Bytes kept for a guest that doesn't read its serial port.
const QUEUE_MAX: usize = 4096;

/// What an escape sequence asks of the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// End the VM.
    End,
    /// Print the VM's state.
    Status,
    /// Print [`HELP`].
    Help,
}

/// What one typed byte comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typed {
    Byte(u8),
    Action(Action),
    Nothing,
}

/// The escape key's state machine.
#[derive(Debug, Default)]
struct Escape {
    begun: bool,
}

impl Escape {
    fn feed(&mut self, byte: u8) -> Typed {
        let begun = std::mem::take(&mut self.begun);
        match (begun, byte) {
            (false, ESCAPE_KEY) => {
                self.begun = true;
                Typed::Nothing
            }
            (false, byte) => Typed::Byte(byte),
            (true, ESCAPE_KEY | b'a') => Typed::Byte(ESCAPE_KEY),
            (true, b'x') => Typed::Action(Action::End),
            (true, b's') => Typed::Action(Action::Status),
            (true, b'h' | b'?') => Typed::Action(Action::Help),
            (true, _) => Typed::Nothing,
        }
    }
}

/// Standard input as the serial port's source of bytes.
///
/// For a loop around `poll(2)`: wait for [`fd`](Self::fd) to be readable, [`read`](Self::read), and hand
/// [`take`](Self::take)'s bytes to the serial device whenever it has room. (`epoll` refuses regular files and
/// `/dev/null`, either of which may be standard input.)
#[derive(Debug)]
pub struct Terminal {
    input: RawFd,
    open: bool,
    /// None where standard input isn't a terminal: a pipe's bytes all go to the guest.
    escape: Option<Escape>,
    queue: VecDeque<u8>,
}

impl Terminal {
    /// Takes standard input. If it is a terminal and this process is in its foreground, puts it in raw mode and prints
    /// [`HINT`]; a background job leaves the terminal alone and reads nothing.
    ///
    /// # Errors
    /// What the terminal said when it would not change its mode.
    pub fn open() -> io::Result<Self> {
        Self::on(io::stdin().as_raw_fd())
    }

    fn on(input: RawFd) -> io::Result<Self> {
        let (mut open, mut escape) = (true, None);
        if is_terminal(input) {
            open = !in_background(input);
            if open {
                enter_raw_mode(input)?;
                complaint::say(HINT);
            }
            escape = Some(Escape::default());
        }
        Ok(Self { input, open, escape, queue: VecDeque::new() })
    }

    /// What to wait on for input; none once input has ended, or while a pipe's bytes wait for the guest.
    ///
    /// A terminal is read even when the guest takes nothing, so that the escape key always works.
    pub fn fd(&self) -> Option<RawFd> {
        let room = self.escape.is_some() || self.queue.len() < QUEUE_MAX;
        (self.open && room).then_some(self.input)
    }

    /// Takes what input there is, without waiting for any. At its end input is closed, which is no error.
    ///
    /// # Errors
    /// A read error other than a hang-up.
    pub fn read(&mut self) -> io::Result<Vec<Action>> {
        if self.fd().is_none() || !readable(self.input)? {
            return Ok(Vec::new());
        }
        let mut buffer = [0; 512];
        let length = match read(self.input, &mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Vec::new()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN)) => return Ok(Vec::new()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EIO)) => 0,
            other => other?,
        };
        self.open = length > 0;
        Ok(self.sort(&buffer[..length]))
    }

    /// Up to `room` bytes for the guest, oldest first.
    pub fn take(&mut self, room: usize) -> Vec<u8> {
        let count = room.min(self.queue.len());
        self.queue.drain(..count).collect()
    }

    /// True if bytes wait for the guest.
    pub fn has_bytes(&self) -> bool {
        !self.queue.is_empty()
    }

    fn sort(&mut self, bytes: &[u8]) -> Vec<Action> {
        let mut actions = Vec::new();
        for &byte in bytes {
            match self.escape.as_mut().map_or(Typed::Byte(byte), |e| e.feed(byte)) {
                Typed::Byte(byte) => self.push(byte),
                Typed::Action(action) => actions.push(action),
                Typed::Nothing => {}
            }
        }
        actions
    }

    /// Typing far ahead of a guest that reads nothing loses the newest keys, as on a real terminal line. A pipe is read
    /// only while the queue is short of its limit, so nothing of it is ever lost.
    fn push(&mut self, byte: u8) {
        if self.escape.is_none() || self.queue.len() < QUEUE_MAX {
            self.queue.push_back(byte);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if self.escape.is_some() {
            give_back();
        }
    }
}

/// The terminal's mode as it was found, while it is in raw mode.
static FOUND: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);

/// Puts the terminal back in the mode it was found in. Harmless when it isn't in raw mode.
///
/// Dropping [`Terminal`], a panic and `exit` do this of themselves.
pub fn give_back() {
    let found = FOUND.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((fd, mode)) = found {
        // SAFETY: `mode` is a termios that tcgetattr filled in.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &mode) };
    }
}

/// As [`give_back`], from a signal handler: without waiting, if another thread is giving it back.
fn give_back_at_once() {
    if let Some((fd, mode)) = FOUND.try_lock().ok().and_then(|found| *found) {
        // SAFETY: `mode` is a termios that tcgetattr filled in.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &mode) };
    }
}

extern "C" fn give_back_at_exit() {
    give_back();
}

fn enter_raw_mode(fd: RawFd) -> io::Result<()> {
    static HOOKS: Once = Once::new();
    HOOKS.call_once(|| {
        lost_ram::before_end(give_back_at_once);
        let earlier = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            earlier(panic);
        }));
        // SAFETY: the handler takes no arguments, never unwinds, and lives as long as the program.
        unsafe { libc::atexit(give_back_at_exit) };
    });
    let found = terminal_mode(fd)?;
    *FOUND.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, found));
    let raw = raw_mode(found);
    // SAFETY: `raw` is a whole termios.
    check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) }).map(drop)
}

fn terminal_mode(fd: RawFd) -> io::Result<libc::termios> {
    let mut mode = std::mem::MaybeUninit::uninit();
    // SAFETY: tcgetattr writes a termios to a place of that size.
    check(unsafe { libc::tcgetattr(fd, mode.as_mut_ptr()) })?;
    // SAFETY: tcgetattr succeeded, so it has filled it in.
    Ok(unsafe { mode.assume_init() })
}

/// Raw, but for output: our own messages end in a bare newline, and a guest's `\r\n` survives `\n` becoming `\r\n`.
fn raw_mode(mut mode: libc::termios) -> libc::termios {
    let output = mode.c_oflag;
    // SAFETY: cfmakeraw changes the termios it is given, and nothing else.
    unsafe { libc::cfmakeraw(&mut mode) };
    mode.c_oflag = output;
    mode
}

fn is_terminal(fd: RawFd) -> bool {
    // SAFETY: isatty takes any number.
    unsafe { libc::isatty(fd) == 1 }
}

/// A background job that changed its terminal's mode, or read from it, would be stopped by a signal. A terminal that
/// isn't this session's own (tcgetpgrp fails) has no background.
fn in_background(fd: RawFd) -> bool {
    // SAFETY: neither call touches our memory; tcgetpgrp takes any number.
    let (foreground, own) = unsafe { (libc::tcgetpgrp(fd), libc::getpgrp()) };
    foreground > 0 && foreground != own
}

/// True if a read would not wait: there are bytes, or the other end is gone.
fn readable(fd: RawFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, and a count of one.
    match check(unsafe { libc::poll(&mut poll, 1, 0) }) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        other => other.map(|count| count > 0),
    }
}

fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as we say.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests;
