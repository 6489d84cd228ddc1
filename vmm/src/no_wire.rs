//! A network cable that leads nowhere.
//!
//! In: frames. Out: nothing. Holds: it is always ready to take a frame, and never has one.

use devices::virtio::{Offloads, Wire};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::EventFd;

/// The cable.
pub struct NoWire(EventFd);

impl NoWire {
    /// One more of them.
    ///
    /// # Errors
    /// The host has no descriptor to give.
    pub fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }
}

impl Wire for NoWire {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }

    fn seen(&mut self) {
        let _ = self.0.read();
    }

    fn again(&mut self) {
        // It fails only when 2^64 - 2 turns are asked for already.
        let _ = self.0.write(1);
    }

    fn receive(&mut self, _frame: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&mut self, _frame: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}
