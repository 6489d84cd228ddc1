//! The registers of the MMIO transport (section 4.2.2): negotiation and queue set-up, as a state machine of its own.
//!
//! In: 32-bit reads and writes at an offset. Out: values, and an [`Event`] when the transport has something to do. Holds:
//! what the driver sets is kept as it was written; whether it makes sense is asked when the driver says `DRIVER_OK`.

use super::queue::QueueState;
use serde::{Deserialize, Serialize};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of a device that isn't a legacy one.
const VERSION: u32 = 2;
/// Nobody's vendor id; drivers don't look at it.
const VENDOR: u32 = 0x304d_4d56;

const MAGIC_VALUE: u64 = 0x000;
const VERSION_OFFSET: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Where a driver writes the number of a queue that has new buffers.
pub const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// Length and base of a shared memory region, four registers; all ones say that there is none.
const SHM: std::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
/// Where the device's own configuration begins.
pub(super) const CONFIG: u64 = 0x100;

/// `VIRTIO_F_INDIRECT_DESC`.
const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub(super) const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
/// What the transport offers for every device.
pub(super) const TRANSPORT_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;

/// Device status (section 2.1).
pub(super) mod status {
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 64;
}

/// Interrupt status: buffers were used.
pub(super) const USED_BUFFER: u32 = 1;
/// Interrupt status: the configuration, or the device status, has changed.
pub(super) const CONFIG_CHANGE: u32 = 2;

/// What survives of a transport.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersState {
    /// Device status.
    pub status: u32,
    /// Which 32 of the device's features are shown.
    pub device_features_sel: u32,
    /// Which 32 of the driver's features are written.
    pub driver_features_sel: u32,
    /// The features that the driver accepts.
    pub driver_features: u64,
    /// The queue that the queue registers are about.
    pub queue_sel: u32,
    /// Why the interrupt was raised, until the driver acknowledges it.
    pub interrupt_status: u32,
    /// How often the configuration has changed.
    pub config_generation: u32,
    /// The queues. As long as the driver has said `DRIVER_OK`, how far each got is the queue's own to say.
    pub queues: Vec<QueueState>,
}

/// What a write leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing.
    None,
    /// Queue `.0` may have new buffers.
    Notified(u32),
    /// The driver is ready.
    Activate,
    /// The driver starts anew.
    Reset,
}

/// What is the same for the device's whole life.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) id: u32,
    pub(super) features: u64,
    pub(super) queues: &'static [u16],
}

impl RegistersState {
    /// After reset.
    pub(super) fn after_reset(queues: &[u16]) -> Self {
        let fresh = |&max: &u16| QueueState { size: max, ..QueueState::default() };
        Self { queues: queues.iter().map(fresh).collect(), ..Self::default() }
    }

    pub(super) fn read(&self, offset: u64, device: &Identity) -> u32 {
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_OFFSET => VERSION,
            DEVICE_ID => device.id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(device.features, self.device_features_sel),
            QUEUE_NUM_MAX => device.queues.get(self.queue_sel as usize).copied().unwrap_or(0).into(),
            QUEUE_READY => self.queues.get(self.queue_sel as usize).is_some_and(|queue| queue.ready).into(),
            INTERRUPT_STATUS => self.interrupt_status,
            STATUS => self.status,
            CONFIG_GENERATION => self.config_generation,
            offset if SHM.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32, device: &Identity) -> Event {
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES if self.may_negotiate() => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            QUEUE_SEL => self.queue_sel = value,
            QUEUE_NOTIFY => return Event::Notified(value),
            INTERRUPT_ACK => self.interrupt_status &= !value,
            STATUS => return self.write_status(value, device),
            _ => self.write_queue(offset, value, device),
        }
        Event::None
    }

    /// Features are fixed once the driver has said `FEATURES_OK` (section 3.1.1).
    fn may_negotiate(&self) -> bool {
        self.status & (status::FEATURES_OK | status::DRIVER_OK) == 0
    }

    /// A queue is set up while the driver isn't ready and the queue isn't either (section 4.2.3.2).
    fn write_queue(&mut self, offset: u64, value: u32, device: &Identity) {
        let index = self.queue_sel as usize;
        let (Some(queue), Some(&max)) = (self.queues.get_mut(index), device.queues.get(index)) else {
            return;
        };
        if self.status & status::DRIVER_OK != 0 {
            return;
        }
        match offset {
            QUEUE_READY => queue.ready = value & 1 != 0,
            _ if queue.ready => {}
            QUEUE_NUM if value <= u32::from(max) => queue.size = value as u16,
            QUEUE_DESC_LOW => set_half(&mut queue.desc_table, 0, value),
            QUEUE_DESC_HIGH => set_half(&mut queue.desc_table, 1, value),
            QUEUE_DRIVER_LOW => set_half(&mut queue.avail_ring, 0, value),
            QUEUE_DRIVER_HIGH => set_half(&mut queue.avail_ring, 1, value),
            QUEUE_DEVICE_LOW => set_half(&mut queue.used_ring, 0, value),
            QUEUE_DEVICE_HIGH => set_half(&mut queue.used_ring, 1, value),
            _ => {}
        }
    }

    /// A bit stays set until reset. `FEATURES_OK` is taken only for features that were offered, the modern ones among them.
    fn write_status(&mut self, value: u32, device: &Identity) -> Event {
        if value == 0 {
            *self = Self::after_reset(device.queues);
            return Event::Reset;
        }
        let set = value & !self.status & 0xff & !status::NEEDS_RESET;
        let acceptable =
            self.driver_features & !device.features == 0 && self.driver_features & VERSION_1 != 0;
        let was_live = self.is_live();
        self.status |= if acceptable { set } else { set & !status::FEATURES_OK };
        // In whichever order the bits came: nothing that is live has not had its queues looked at.
        if self.is_live() && !was_live { Event::Activate } else { Event::None }
    }

    /// Whether a state from a snapshot is one that a device of this kind can have.
    pub(super) fn check(&self, device: &Identity) -> Result<(), String> {
        if self.queues.len() != device.queues.len() {
            return Err(format!("{} queues, expected {}", self.queues.len(), device.queues.len()));
        }
        if self.driver_features & !device.features != 0 && self.status & status::FEATURES_OK != 0 {
            return Err(format!(
                "features {:#x} that are not offered",
                self.driver_features & !device.features
            ));
        }
        let too_large = self.queues.iter().zip(device.queues).find(|(queue, max)| queue.size > **max);
        too_large.map_or(Ok(()), |(queue, max)| {
            Err(format!("a queue of {} entries, expected at most {max}", queue.size))
        })
    }

    pub(super) fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0
            && self.status & status::FEATURES_OK != 0
            && self.status & status::NEEDS_RESET == 0
    }
}

fn half(value: u64, which: u32) -> u32 {
    match which {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, which: u32, half: u32) {
    match which {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
