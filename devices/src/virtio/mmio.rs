//! The MMIO transport (section 4.2): one device behind one window of registers.
//!
//! In: register accesses from vCPUs, notifications and host events from the I/O thread. Out: calls to the [`Device`], and
//! the interrupt. Holds: the device sees its queues only while the driver is ready and has kept the rules.

use super::queue::Queue;
use super::registers::{
    CONFIG, CONFIG_CHANGE, EVENT_IDX, Event, Identity, QUEUE_NOTIFY, RegistersState, TRANSPORT_FEATURES,
    USED_BUFFER, status,
};
use super::{Broken, Device, Guest};
use crate::Memory;
use crate::{BusDevice, Interrupt, Persist, Request};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// A transport, whatever the device behind it.
pub trait Transport: BusDevice {
    /// How many queues there are.
    fn queues(&self) -> usize;
    /// The driver has notified `queue`, or may have.
    fn notified(&mut self, queue: usize);
    /// What tells of work from the host; see [`Device::host_fd`].
    fn host_fd(&self) -> Option<BorrowedFd<'_>>;
    /// There may be work from the host.
    fn host_ready(&mut self);
    /// The queues that were left before their end since this was last asked, a bit for each: they are to be notified again.
    fn unfinished(&mut self) -> u64;
    /// Finishes what is under way, until `deadline` at the latest.
    fn drain(&mut self, deadline: Instant);
    /// The machine starts, and was restored: whatever notification or interrupt was on its way is repeated.
    fn start(&mut self);
    /// What rule the driver broke, if it has broken one since its last reset.
    fn broken(&self) -> Option<&Broken>;
}

/// What survives of a transport and the device behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState<S> {
    /// The transport; none for a device that no driver has touched.
    pub registers: Option<RegistersState>,
    /// The device.
    pub device: S,
}

/// What a transport needs of the host.
pub struct MmioHost<H> {
    /// Guest RAM.
    pub memory: Memory,
    /// The window's interrupt. Its edge may be on its way still when a machine is captured: what the driver has not
    /// acknowledged is raised again by [`Transport::start`].
    pub irq: Box<dyn Interrupt>,
    /// What the device needs.
    pub device: H,
}

/// Why a state was refused.
#[derive(Debug, thiserror::Error)]
pub enum MmioStateError<E> {
    /// The transport's part.
    #[error("{0}")]
    Registers(String),
    /// A queue that the driver can't have set up.
    #[error("queue {index}: {source}")]
    Queue {
        /// Which.
        index: usize,
        /// What is wrong with it.
        source: Broken,
    },
    /// The device's part.
    #[error(transparent)]
    Device(E),
}

/// A device behind its window of registers.
pub struct Mmio<D> {
    registers: RegistersState,
    identity: Identity,
    queues: Vec<Queue>,
    broken: Option<Broken>,
    unfinished: u64,
    memory: Memory,
    irq: Box<dyn Interrupt>,
    device: D,
}

impl<D: Device> Mmio<D> {
    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether the driver is ready, and has kept the rules.
    pub fn is_live(&self) -> bool {
        self.registers.is_live()
    }

    /// Lets the device work on its queues, and tells the driver what came of it.
    pub fn work(&mut self, work: impl FnOnce(&mut D, &mut Guest) -> Result<(), Broken>) {
        if !self.registers.is_live() {
            return;
        }
        let mut guest = Guest::new(&self.memory, &mut self.queues);
        let done = work(&mut self.device, &mut guest);
        let changed = guest.config_changed;
        self.unfinished |= guest.unfinished;
        if changed {
            self.config_changed();
        }
        if let Err(broken) = done.and_then(|()| self.tell_used()) {
            self.needs_reset(broken);
        }
    }

    fn tell_used(&mut self) -> Result<(), Broken> {
        let mut wanted = false;
        for queue in &mut self.queues {
            wanted |= queue.wants_interrupt(&self.memory)?;
        }
        if wanted {
            self.raise(USED_BUFFER);
        }
        Ok(())
    }

    fn config_changed(&mut self) {
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&mut self, why: u32) {
        self.registers.interrupt_status |= why;
        // A host that won't take it is out of order as a whole; the driver finds its buffers when it next looks.
        let _ = self.irq.trigger();
    }

    /// Section 2.1.2: the device stops, and says so.
    fn needs_reset(&mut self, broken: Broken) {
        self.queues.clear();
        self.unfinished = 0;
        self.device.reset();
        self.broken = Some(broken);
        self.registers.status |= status::NEEDS_RESET;
        self.raise(CONFIG_CHANGE);
    }

    fn activate(&mut self) {
        match self.set_up_queues() {
            Ok(queues) => {
                self.queues = queues;
                self.device.activate(self.registers.driver_features);
            }
            Err((index, broken)) => self.needs_reset(Broken::new(format!("queue {index}: {broken}"))),
        }
    }

    /// A queue that the driver left alone is one without buffers.
    fn set_up_queues(&self) -> Result<Vec<Queue>, (usize, Broken)> {
        let event_idx = self.registers.driver_features & EVENT_IDX != 0;
        let states = self.registers.queues.iter().zip(self.identity.queues).enumerate();
        states
            .map(|(index, (state, max))| {
                Queue::from_state(state, *max, event_idx, &self.memory).map_err(|broken| (index, broken))
            })
            .collect()
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.unfinished = 0;
        self.broken = None;
        self.device.reset();
    }

    /// Without the I/O thread, which knows other turns: at a start, when no vCPU lends more, and for a vCPU that comes this way.
    fn notified_here(&mut self, queue: usize) {
        if queue >= self.queues.len() {
            return;
        }
        self.notified(queue);
        while self.unfinished & 1 << queue != 0 {
            self.unfinished &= !(1 << queue);
            self.notified(queue);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match self.registers.write(offset, value, &self.identity) {
            Event::None => {}
            Event::Notified(queue) => self.notified_here(queue as usize),
            Event::Activate => self.activate(),
            Event::Reset => self.reset(),
        }
    }
}

impl<D: Device> BusDevice for Mmio<D> {
    /// Registers are read 32 bits at a time (section 4.2.2.2), the configuration at any width.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            let config = self.device.config();
            for (at, byte) in (offset - CONFIG..).zip(data) {
                *byte = config.get(at as usize).copied().unwrap_or(0);
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.registers.read(offset, &self.identity).to_le_bytes());
        } else {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        if offset >= CONFIG {
            self.device.write_config(offset - CONFIG, data);
        } else if let (0, Ok(bytes)) = (offset % 4, data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        None
    }
}

impl<D: Device> Transport for Mmio<D> {
    fn queues(&self) -> usize {
        self.identity.queues.len()
    }

    fn notified(&mut self, queue: usize) {
        if queue < self.queues.len() {
            self.work(|device, guest| device.notified(queue, guest));
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.host_fd()
    }

    fn host_ready(&mut self) {
        self.work(Device::host_ready);
    }

    fn unfinished(&mut self) -> u64 {
        std::mem::take(&mut self.unfinished)
    }

    fn drain(&mut self, deadline: Instant) {
        self.work(|device, guest| device.drain(deadline, guest));
    }

    fn start(&mut self) {
        self.work(Device::restored);
        for queue in 0..self.queues.len() {
            self.notified_here(queue);
        }
        self.host_ready();
        if self.registers.interrupt_status != 0 {
            self.raise(0);
        }
    }

    fn broken(&self) -> Option<&Broken> {
        self.broken.as_ref()
    }
}

impl<D: Device + Persist> Persist for Mmio<D> {
    type State = MmioState<D::State>;
    type Host = MmioHost<D::Host>;
    type Error = MmioStateError<D::Error>;

    fn save(&self) -> Self::State {
        let mut registers = self.registers.clone();
        for (state, queue) in registers.queues.iter_mut().zip(&self.queues) {
            (state.next_avail, state.next_used) = queue.progress();
        }
        MmioState { registers: Some(registers), device: self.device.save() }
    }

    fn from_state(state: &Self::State, host: Self::Host) -> Result<Self, Self::Error> {
        let device = D::from_state(&state.device, host.device).map_err(MmioStateError::Device)?;
        let features = device.features() | TRANSPORT_FEATURES;
        let identity = Identity { id: D::ID, features, queues: D::QUEUES };
        let registers =
            state.registers.clone().unwrap_or_else(|| RegistersState::after_reset(identity.queues));
        registers.check(&identity).map_err(MmioStateError::Registers)?;
        let (memory, irq) = (host.memory, host.irq);
        let mut mmio = Self {
            registers,
            identity,
            queues: Vec::new(),
            broken: None,
            unfinished: 0,
            memory,
            irq,
            device,
        };
        if mmio.registers.is_live() {
            mmio.queues =
                mmio.set_up_queues().map_err(|(index, source)| MmioStateError::Queue { index, source })?;
            mmio.device.activate(mmio.registers.driver_features);
        }
        Ok(mmio)
    }
}

/// The offset of the notification register: where an ioeventfd goes.
const _: () = assert!(QUEUE_NOTIFY < CONFIG);

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
