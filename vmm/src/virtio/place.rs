//! A device's place: its window, its interrupt line, and what it has of the host.
//!
//! In: a device's state. Out: the device, on the bus and with what its state names of the host. Holds: of a machine that is cut off nothing
//! is opened on the host but its disks and its vsock socket.

use super::{Attached, DeviceState, VirtioError, VirtioHost};
use crate::console_thread::ConsoleThread;
use crate::discard::RamDiscard;
use crate::disk;
use crate::io_thread::Window;
use crate::layout;
use crate::no_wire::NoWire;
use crate::panic_watch::Watched;
use crate::tap::{Tap, TapName};
use crate::vsock;
use devices::virtio::{
    BlkHost, Device, Discard, Entropy, Mmio, MmioHost, MmioState, Output, QUEUE_NOTIFY, VsockHost,
    VsockState, Wire,
};
use devices::{Bus, Interrupt, Persist, lock};
use kvm_ioctls::IoEventAddress;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Where a device goes.
pub(super) struct Place<'a> {
    pub(super) slot: usize,
    pub(super) id: &'a str,
    pub(super) host: &'a VirtioHost<'a>,
}

impl Place<'_> {
    /// Opens what the state names of the host, and makes the device of it.
    pub(super) fn attach(&self, state: &DeviceState) -> Result<Attached, VirtioError> {
        Ok(match state {
            DeviceState::Rng(state) => Attached::Rng(self.make(state, entropy())?),
            DeviceState::Balloon(state) => {
                let discard: Box<dyn Discard> = Box::new(RamDiscard::new(self.host.ram));
                Attached::Balloon(self.make(state, discard)?)
            }
            DeviceState::Console(state) => Attached::Console(self.make(state, self.console()?)?),
            DeviceState::Vsock { path, state } => self.attach_vsock(path, state)?,
            DeviceState::Blk(state) => Attached::Blk(self.make(state, self.disk()?)?),
            DeviceState::Net { tap, state } => Attached::Net(tap.clone(), self.make(state, self.wire(tap)?)?),
        })
    }

    fn console(&self) -> Result<Box<dyn Output>, VirtioError> {
        if self.host.alone {
            return Ok(Box::new(Unheard(self.host.panicked.clone().over(io::sink()))));
        }
        let thread = ConsoleThread::stdout(self.host.panicked.clone());
        Ok(Box::new(thread.map_err(|source| self.failed(source))?))
    }

    fn wire(&self, tap: &TapName) -> Result<Box<dyn Wire>, VirtioError> {
        if self.host.alone {
            return Ok(Box::new(NoWire::new().map_err(|source| self.failed(source))?));
        }
        let refused = |source| VirtioError::Tap { id: self.id.to_owned(), source };
        Ok(Box::new(Tap::open(tap).map_err(refused)?))
    }

    fn attach_vsock(&self, path: &Path, state: &MmioState<VsockState>) -> Result<Attached, VirtioError> {
        let refused = |source| VirtioError::Vsock { id: self.id.to_owned(), source };
        let (file, streams) = vsock::open(path).map_err(refused)?;
        let streams: Box<dyn VsockHost> = Box::new(streams);
        Ok(Attached::Vsock(self.make(state, streams)?, file))
    }

    fn disk(&self) -> Result<BlkHost, VirtioError> {
        let disk = self.host.disks.iter().find(|disk| disk.id == self.id);
        let disk = disk.ok_or_else(|| VirtioError::NoDisk { id: self.id.to_owned() })?;
        let memory = self.host.ram.memory();
        let engine = disk::engine(&disk.file, memory, disk.engine).map_err(|source| VirtioError::Engine {
            id: self.id.to_owned(),
            engine: disk.engine,
            source,
        })?;
        Ok(BlkHost { engine, memory: memory.clone() })
    }

    fn make<D>(
        &self,
        state: &MmioState<D::State>,
        device: D::Host,
    ) -> Result<Arc<Mutex<Mmio<D>>>, VirtioError>
    where
        D: Device + Persist,
    {
        let irq = Box::new(self.irqfd().map_err(|source| self.failed(source))?);
        let host = MmioHost { memory: self.host.ram.memory().clone(), irq, device };
        let made = Mmio::from_state(state, host)
            .map_err(|error| VirtioError::State { id: self.id.to_owned(), reason: error.to_string() })?;
        Ok(Arc::new(Mutex::new(made)))
    }

    /// Puts the window on the bus, except that notifications go to the I/O thread without an exit to this process.
    pub(super) fn connect(&self, device: &Attached, bus: &mut Bus) -> Result<Window, VirtioError> {
        let transport = device.transport();
        let base = layout::virtio_window(self.slot);
        let queues = (0..lock(&*transport).queues() as u32).map(|queue| self.ioeventfd(base, queue));
        let queues = queues.collect::<io::Result<_>>().map_err(|source| self.failed(source))?;
        bus.insert(base, layout::VIRTIO_MMIO_SIZE, transport.clone())?;
        Ok(Window { transport, queues })
    }

    fn ioeventfd(&self, base: u64, queue: u32) -> io::Result<EventFd> {
        let event = event()?;
        let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
        self.host.vm.register_ioevent(&event, &address, queue).map_err(from_errno)?;
        Ok(event)
    }

    fn irqfd(&self) -> io::Result<IrqFd> {
        let event = event()?;
        self.host.vm.register_irqfd(&event, layout::virtio_gsi(self.slot)).map_err(from_errno)?;
        Ok(IrqFd(event))
    }

    fn failed(&self, source: io::Error) -> VirtioError {
        VirtioError::Connect { id: self.id.to_owned(), source }
    }
}

/// A console whose output nobody is to see, but for a panic.
struct Unheard(Watched<io::Sink>);

impl Output for Unheard {
    fn put(&mut self, bytes: &[u8]) -> usize {
        let _ = self.0.write_all(bytes);
        bytes.len()
    }

    fn room_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// An edge that KVM's worker carries into the interrupt controllers, soon.
struct IrqFd(EventFd);

impl Interrupt for IrqFd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

fn entropy() -> Entropy {
    Box::new(|mut bytes| {
        while !bytes.is_empty() {
            let filled = getrandom(&mut *bytes, GetRandomFlags::empty())?;
            bytes = &mut bytes[filled..];
        }
        Ok(())
    })
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn from_errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
