//! Virtio devices behind the MMIO transport (Virtual I/O Device specification 1.2).
//!
//! In: registers that a driver writes, queues in its memory, events from the host. Out: used buffers, an interrupt, work
//! for the host. Holds: nothing that a driver writes is believed; one that breaks a rule finds its device in need of a
//! reset, and everybody else goes on.
//!
//! ```text
//! driver ── registers ──► Mmio<D> ── notified(queue) ──► D ── work ──► host
//!        ◄─ interrupt ──          ◄─ push(used) ───────   ◄─ ready ──
//! ```

mod balloon;
mod console;
mod blk;
mod disk;
#[cfg(test)]
mod hostile;
mod mmio;
mod net;
mod queue;
mod registers;
mod rng;
#[cfg(test)]
pub(crate) mod testing;
mod vsock;

pub use balloon::{Balloon, BalloonState, Discard};
pub use blk::{Blk, BlkHost, BlkState, BlkStateError, Request, SERIAL_MAX};
pub use console::{Console, ConsoleState, ConsoleStateError, Output};
pub use disk::{Completion, DiskEngine, Operation, SECTOR};
pub use mmio::{Mmio, MmioHost, MmioState, MmioStateError, Transport};
pub use net::{Counters, Mac, MacError, Net, NetState, NetStateError, Offloads, Wire};
pub use queue::{Broken, Chain, Queue, QueueState, Segment, Segments};
pub use registers::{QUEUE_NOTIFY, RegistersState};
pub use rng::{Entropy, Rng};
pub use vsock::{HostEvent, StreamId, UnixVsock, Vsock, VsockHost, VsockState, VsockStateError};

use crate::Memory;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Most buffers that a device takes from a queue before others have their turn. A driver on another vCPU can lend them as fast as
/// they come back; whoever waits for the device, or for its thread, must not wait for that.
pub(crate) const TURN: usize = 256;

/// What is behind the transport: one kind of virtio device.
///
/// Its methods run under the transport's lock, on a vCPU's thread or on the I/O thread: they do what can be done at once,
/// and never wait. An `Err` says that the driver broke a rule; the transport then sets `DEVICE_NEEDS_RESET`.
pub trait Device: Send {
    /// Device ID (section 5).
    const ID: u32;
    /// The longest size of each queue, each a power of two up to 32768. Their number is the number of queues.
    const QUEUES: &'static [u16];

    /// The features of this kind of device that are offered: bits 0 to 23 and 50 to 127 (section 2.2). The transport adds its own.
    fn features(&self) -> u64 {
        0
    }

    /// The device-specific configuration as it is now (section 2.5). Beyond its end a driver reads zeroes.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes `data` at `offset` of the configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has said `DRIVER_OK`, having accepted `features`; or a device that it had said that to was restored.
    fn activate(&mut self, _features: u64) {}

    /// The driver resets the device: what is under way is given up, and afterwards nothing touches guest memory.
    fn reset(&mut self) {}

    /// The driver has put buffers into `queue`, or may have.
    ///
    /// # Errors
    /// The driver broke a rule.
    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken>;

    /// A descriptor that becomes readable when the host has something for the device. It is watched for its edge: the device
    /// takes all there is, or knows when to ask again.
    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The descriptor is readable, or may be.
    ///
    /// # Errors
    /// The driver broke a rule.
    fn host_ready(&mut self, _guest: &mut Guest) -> Result<(), Broken> {
        Ok(())
    }

    /// Finishes what is under way in the host, until `deadline` at the latest. What is left then is part of the device's
    /// state, and begun anew by a restore. No vCPU runs meanwhile.
    ///
    /// # Errors
    /// The driver broke a rule.
    fn drain(&mut self, _deadline: Instant, _guest: &mut Guest) -> Result<(), Broken> {
        Ok(())
    }

    /// The machine goes on after a restore: for what a device has to tell its driver then, or to begin anew.
    ///
    /// # Errors
    /// The driver broke a rule.
    fn restored(&mut self, _guest: &mut Guest) -> Result<(), Broken> {
        Ok(())
    }
}

/// The driver's side of a device while the device works: its memory and its queues.
pub struct Guest<'a> {
    /// Guest RAM.
    pub memory: &'a Memory,
    queues: &'a mut [Queue],
    config_changed: bool,
    /// A bit for each queue.
    unfinished: u64,
}

impl<'a> Guest<'a> {
    fn new(memory: &'a Memory, queues: &'a mut [Queue]) -> Self {
        Self { memory, queues, config_changed: false, unfinished: 0 }
    }

    /// The next buffer that the driver made available in `queue`; `None` if there is none, or no such queue in use.
    ///
    /// # Errors
    /// The queue or the buffer is malformed.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        match self.queues.get_mut(queue) {
            Some(queue) => queue.pop(self.memory),
            None => Ok(None),
        }
    }

    /// Makes the last popped buffer of `queue` available again, for a device that found no use for it yet.
    pub fn unpop(&mut self, queue: usize) {
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.unpop();
        }
    }

    /// Gives a buffer back to the driver, `len` bytes of it written.
    ///
    /// # Errors
    /// The queue is malformed.
    pub fn push(&mut self, queue: usize, head: u16, len: u32) -> Result<(), Broken> {
        self.push_together(queue, &[(head, len)])
    }

    /// Gives buffers, each a head and how many bytes were written, back to the driver as one: it finds all or none.
    ///
    /// # Errors
    /// The queue is malformed.
    pub fn push_together(&mut self, queue: usize, used: &[(u16, u32)]) -> Result<(), Broken> {
        match self.queues.get_mut(queue) {
            Some(queue) => queue.push(self.memory, used),
            None => Ok(()),
        }
    }

    /// How many entries `queue` has.
    pub fn queue_size(&self, queue: usize) -> usize {
        self.queues.get(queue).map_or(0, |queue| queue.size().into())
    }

    /// There may be more buffers in `queue`, but others have their turn first: the device will be notified again.
    pub fn again(&mut self, queue: usize) {
        self.unfinished |= 1 << queue;
    }

    /// The driver will be told that the configuration has changed.
    pub fn change_config(&mut self) {
        self.config_changed = true;
    }
}
