//! Emulated devices. They know offsets and an interrupt line; never KVM, never addresses.
//!
//! In: reads and writes at an offset into the device, bytes from the host. Out: an interrupt, bytes to the host, and a
//! [`Request`] when the guest asks for something that only the machine can do. Holds: a device is its state plus its
//! host ends, and its state is plain data.
#![forbid(unsafe_code)]

mod acpi_pm;
mod bus;
mod exit;
mod i8042;
mod memory;
mod panic;
mod rtc;
mod serial;
pub mod virtio;
mod vmgenid;

pub use acpi_pm::{AcpiPm, RESET_VALUE, SLEEP_TYPE_S5};
pub use bus::{Bus, BusError, lock};
pub use exit::{ExitPort, RESTART, RETURN};
pub use i8042::I8042;
pub use memory::{Marks, Memory, MemoryRegion, marks};
pub use panic::PanicDevice;
pub use rtc::{HostTime, RTC_CENTURY, Rtc, RtcState, RtcStateError};
pub use serial::{Serial, SerialHost, SerialState, SerialStateError};
pub use vmgenid::{GENERATION_LEN, Generation, GenerationHost, Publish, VmGenId};

use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::io;

/// What a guest asks of the machine through a device's register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// ACPI S5.
    PowerOff,
    /// The ACPI reset register, or the i8042's reset line.
    Reset,
    /// The guest's kernel has panicked and said so.
    Panicked,
    /// The exit port: end the VM with this status.
    Exit(u8),
    /// The control port: let the kernel that sleeps go on.
    Return,
    /// The control port: restart the machine from the image that this kernel wrote.
    Restart,
}

/// A device on the I/O port or memory bus.
///
/// `offset` counts from the device's first register. A guest may send any offset and any length from 1 to 8: what a
/// device doesn't know reads as all ones and ignores writes.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`; returns what the machine has to do about it, if anything.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request>;
}

/// An interrupt line, as a device sees it.
pub trait Interrupt: Send {
    /// Raises the line's edge once. Whether the edge is part of the interrupt controller's state when this returns, or on its
    /// way there, is the line's to say: a device whose line may be slow repeats after a restore what was not acknowledged.
    ///
    /// # Errors
    /// What the host said when it would not take the interrupt.
    fn trigger(&self) -> io::Result<()>;
}

/// What survives a device: plain data, saved by one function and put back by another.
pub trait Persist: Sized {
    /// The device's state; `()` if it has none.
    type State: Serialize + for<'a> Deserialize<'a>;
    /// The device's ends in the host: an interrupt, an output, a file.
    type Host;
    /// Why a state was refused.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The state as of now.
    fn save(&self) -> Self::State;
    /// A device with this state on these host ends. The state may come from a hostile file.
    ///
    /// # Errors
    /// A state that no such device could have.
    fn from_state(state: &Self::State, host: Self::Host) -> Result<Self, Self::Error>;
}

/// A device with nothing to keep and no end in the host: a new one is as good as that which was saved.
pub trait Stateless: Default {}

impl<D: Stateless> Persist for D {
    type State = ();
    type Host = ();
    type Error = Infallible;

    fn save(&self) {}

    fn from_state((): &(), (): ()) -> Result<D, Infallible> {
        Ok(D::default())
    }
}
