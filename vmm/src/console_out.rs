//! The console's way out: standard output, without ever holding up a pause.
//!
//! In: bytes that the guest writes to its serial port, on a vCPU's thread. Out: the same bytes on standard output. Holds:
//! a reader that doesn't read makes the guest wait, as it should, but a kick ends the wait: what is left is kept and goes
//! out first the next time.

use crate::vcpu;
use std::io::{self, Stdout, Write};
use std::os::fd::AsRawFd;

/// How long a full pipe is waited for before the kick is looked at again, in milliseconds.
const PATIENCE: i32 = 20;

/// Standard output, for a guest's console.
#[derive(Debug)]
pub struct ConsoleOut {
    out: Stdout,
    kept: Vec<u8>,
}

impl ConsoleOut {
    /// The process's standard output.
    pub fn stdout() -> Self {
        Self { out: io::stdout(), kept: Vec::new() }
    }

    fn send_kept(&mut self) -> io::Result<()> {
        while !self.kept.is_empty() {
            if !writable(&self.out) {
                if vcpu::kick_pending() {
                    return Ok(());
                }
                continue;
            }
            match self.out.lock().write(&self.kept) {
                Ok(sent) => drop(self.kept.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.kept.clear();
                    return Err(error);
                }
            }
            self.out.flush()?;
        }
        Ok(())
    }
}

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.kept.extend_from_slice(bytes);
        self.send_kept()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_kept()
    }
}

/// Whether a write would not block, or would fail at once.
fn writable(out: &Stdout) -> bool {
    let mut fd = libc::pollfd { fd: out.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd, which outlives the call.
    unsafe { libc::poll(&raw mut fd, 1, PATIENCE) > 0 }
}

/// What a pause kept back goes out if there is room; the end waits for no reader.
impl Drop for ConsoleOut {
    fn drop(&mut self) {
        if !self.kept.is_empty() && writable(&self.out) {
            let _ = self.out.write_all(&self.kept);
        }
    }
}
