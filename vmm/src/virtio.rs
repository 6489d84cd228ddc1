//! The virtio devices of a machine: which there are, in which window, with which of the host's ends.
//!
//! In: the devices' states, a VM, guest RAM. Out: transports on the memory bus and the I/O thread, and the states again.
//! Holds: a device's place in the list is its window and its interrupt line for life; what a state names of the host (a
//! path, a tap) is opened here, so that a boot and a restore open it alike.

mod place;

use place::Place;

use crate::config::parse_name;
use crate::disk::{self, Disk};
use crate::io_thread::IoThread;
use crate::layout;
use crate::panic_watch::PanicWatch;
use crate::ram::GuestRam;
use crate::socket_file::SocketFile;
use crate::tap::{TapError, TapName};
use crate::vsock::VsockError;
use devices::virtio::{
    Balloon, BalloonState, Blk, BlkState, Console, ConsoleState, Mac, Mmio, MmioState, Net, NetState, Rng,
    Transport, Vsock, VsockState,
};
use devices::{Bus, BusError, Persist, lock};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// One device, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlotState {
    /// What its owner calls it; no other device of the machine is called the same.
    pub id: String,
    /// What it is.
    pub device: DeviceState,
}

impl SlotState {
    /// The same device after reset: what its driver and its guest made of it is gone, what its owner made it stays.
    pub fn after_reset(&self) -> Self {
        let device = match &self.device {
            DeviceState::Rng(_) => DeviceState::Rng(MmioState::default()),
            DeviceState::Balloon(_) => DeviceState::Balloon(MmioState::default()),
            DeviceState::Console(_) => DeviceState::Console(MmioState::default()),
            DeviceState::Vsock { path, state } => {
                DeviceState::Vsock { path: path.clone(), state: fresh(VsockState::new(state.device.cid)) }
            }
            DeviceState::Blk(state) => {
                DeviceState::Blk(fresh(BlkState { unfinished: Vec::new(), ..state.device.clone() }))
            }
            DeviceState::Net { tap, state } => {
                let device = NetState { announce: false, offloads: None, ..state.device.clone() };
                DeviceState::Net { tap: tap.clone(), state: fresh(device) }
            }
        };
        Self { id: self.id.clone(), device }
    }

    /// Whether it is a disk.
    pub fn is_disk(&self) -> bool {
        matches!(self.device, DeviceState::Blk(_))
    }
}

fn fresh<S>(device: S) -> MmioState<S> {
    MmioState { registers: None, device }
}

/// The state of a device of any kind, with what it has of the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum DeviceState {
    /// Entropy.
    Rng(MmioState<()>),
    /// A memory balloon.
    Balloon(MmioState<BalloonState>),
    /// A console, on standard output.
    Console(MmioState<ConsoleState>),
    /// Sockets between the guest and the host.
    Vsock {
        /// The socket file that clients of the host come to.
        path: PathBuf,
        /// The device.
        state: MmioState<VsockState>,
    },
    /// A disk. What is behind it is the host's, and found by the id.
    Blk(MmioState<BlkState>),
    /// A network device.
    Net {
        /// Its tap.
        tap: TapName,
        /// The device.
        state: MmioState<NetState>,
    },
}

/// Why devices could not be had.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Too many.
    #[error("{count} virtio devices: expected at most {}", layout::VIRTIO_SLOTS)]
    TooMany {
        /// How many there would be.
        count: usize,
    },
    /// Two of the same name, or a name that can't be shown.
    #[error("device id `{0}`: expected a printable name that no other device has")]
    BadId(String),
    /// A device refused its state.
    #[error("device `{id}`: {reason}")]
    State {
        /// Which.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A disk that the host doesn't give.
    #[error("disk `{id}` is not there: none of the machine's disks has that id")]
    NoDisk {
        /// Which.
        id: String,
    },
    /// The host's disk can't be worked on as was wished.
    #[error("disk `{id}`: cannot set up its {engine} engine")]
    Engine {
        /// Which.
        id: String,
        /// What was wished.
        engine: disk::EngineChoice,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no event, or no way for it into the VM.
    #[error("device `{id}`: cannot connect it to the VM")]
    Connect {
        /// Which.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// A vsock device's socket file.
    #[error("device `{id}`: {source}")]
    Vsock {
        /// Which.
        id: String,
        /// Why there is none.
        source: VsockError,
    },
    /// A network device's tap.
    #[error("device `{id}`")]
    Tap {
        /// Which.
        id: String,
        /// Why it can't be had.
        source: TapError,
    },
    /// No thread.
    #[error("cannot start the I/O thread")]
    Thread(#[source] io::Error),
    /// Two devices at one address: a mistake in the layout.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// What the devices need of the machine.
pub struct VirtioHost<'a> {
    /// Takes notifications and interrupts.
    pub vm: &'a VmFd,
    /// Where drivers keep their queues.
    pub ram: &'a GuestRam,
    /// Sees what a console puts out.
    pub panicked: &'a PanicWatch,
    /// What is behind the disks.
    pub disks: &'a [Disk],
    /// Whether networks have no wire, and what a console puts out is dropped.
    pub alone: bool,
}

/// The devices, and the thread that serves them.
pub struct Virtio {
    slots: Vec<Slot>,
    /// None without devices.
    io: Option<IoThread>,
    started: bool,
}

struct Slot {
    id: String,
    device: Attached,
}

impl Slot {
    fn network(&self) -> Option<(&str, &TapName, Mac)> {
        match &self.device {
            Attached::Net(tap, device) => Some((&self.id, tap, lock(device).device().mac())),
            _ => None,
        }
    }
}

/// A device of any kind.
enum Attached {
    Rng(Arc<Mutex<Mmio<Rng>>>),
    Balloon(Arc<Mutex<Mmio<Balloon>>>),
    Console(Arc<Mutex<Mmio<Console>>>),
    Vsock(Arc<Mutex<Mmio<Vsock>>>, SocketFile),
    Blk(Arc<Mutex<Mmio<Blk>>>),
    Net(TapName, Arc<Mutex<Mmio<Net>>>),
}

/// How long I/O under way is waited for before a capture.
const DRAIN: Duration = Duration::from_secs(5);

impl Virtio {
    /// Builds the devices, each in its window of `bus`. They stand still until [`Virtio::run`].
    ///
    /// # Errors
    /// A state that a device refuses, or a host that lacks what it names.
    pub fn from_state(states: &[SlotState], host: &VirtioHost, bus: &mut Bus) -> Result<Self, VirtioError> {
        check_ids(states)?;
        let mut slots = Vec::new();
        let mut windows = Vec::new();
        for (slot, state) in (0..).zip(states) {
            let place = Place { slot, id: &state.id, host };
            let device = place.attach(&state.device)?;
            windows.push(place.connect(&device, bus)?);
            slots.push(Slot { id: state.id.clone(), device });
        }
        let io = (!windows.is_empty()).then(|| IoThread::new(windows)).transpose();
        Ok(Self { slots, io: io.map_err(VirtioError::Thread)?, started: false })
    }

    /// Every device's state. The devices must stand still.
    pub fn save(&self) -> Vec<SlotState> {
        let state = |slot: &Slot| SlotState { id: slot.id.clone(), device: slot.device.save() };
        self.slots.iter().map(state).collect()
    }

    /// The socket file of the vsock device, if there is one.
    pub fn vsock_path(&self) -> Option<&Path> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Attached::Vsock(_, file) => Some(file.path()),
            _ => None,
        })
    }

    /// Of each network device the id, the tap, and the guest's address.
    pub fn networks(&self) -> Vec<(&str, &TapName, Mac)> {
        self.slots.iter().filter_map(Slot::network).collect()
    }

    /// Lets the devices work.
    pub fn run(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.each(|transport| transport.start());
        }
        self.io.iter_mut().for_each(IoThread::serve);
    }

    /// Has the devices stand still: nothing but a vCPU touches them when this returns.
    pub fn pause(&mut self) {
        self.io.iter_mut().for_each(IoThread::park);
    }

    /// Finishes what is under way in the host, as far as a bounded time allows. The devices and the vCPUs stand still.
    pub fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        self.each(|transport| transport.drain(deadline));
    }

    /// Whether there is a console whose driver is ready.
    pub fn has_console(&self) -> bool {
        self.console().is_some()
    }

    /// Gives the console what `take` has for it, which is asked for as many bytes as there is room for.
    pub fn feed_console(&self, take: impl FnOnce(usize) -> Vec<u8>) {
        if let Some(console) = self.console() {
            lock(console).work(|console, guest| console.enqueue(&take(console.room()), guest));
        }
    }

    fn console(&self) -> Option<&Mutex<Mmio<Console>>> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Attached::Console(console) if lock(console).is_live() => Some(&**console),
            _ => None,
        })
    }

    /// Asks the guest to give up `bytes` of its memory in all; `false` if there is no balloon.
    pub fn set_balloon(&self, bytes: u64) -> bool {
        let Some(balloon) = self.balloon() else { return false };
        let mut balloon = lock(balloon);
        balloon.device().set_target(bytes);
        balloon.work(|_, guest| {
            guest.change_config();
            Ok(())
        });
        true
    }

    /// Bytes that the guest was asked to give up, and that it says it has; none if there is no balloon.
    pub fn balloon_sizes(&self) -> Option<(u64, u64)> {
        Some(lock(self.balloon()?).device().sizes())
    }

    fn balloon(&self) -> Option<&Mutex<Mmio<Balloon>>> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Attached::Balloon(balloon) => Some(&**balloon),
            _ => None,
        })
    }

    fn each(&self, act: impl Fn(&mut dyn Transport)) {
        for slot in &self.slots {
            act(&mut *lock(&*slot.device.transport()));
        }
    }
}

impl Attached {
    fn save(&self) -> DeviceState {
        match self {
            Self::Rng(device) => DeviceState::Rng(lock(device).save()),
            Self::Balloon(device) => DeviceState::Balloon(lock(device).save()),
            Self::Console(device) => DeviceState::Console(lock(device).save()),
            Self::Vsock(device, file) => {
                DeviceState::Vsock { path: file.path().to_owned(), state: lock(device).save() }
            }
            Self::Blk(device) => DeviceState::Blk(lock(device).save()),
            Self::Net(tap, device) => DeviceState::Net { tap: tap.clone(), state: lock(device).save() },
        }
    }

    fn transport(&self) -> Arc<Mutex<dyn Transport + Send>> {
        match self {
            Self::Rng(device) => device.clone(),
            Self::Balloon(device) => device.clone(),
            Self::Console(device) => device.clone(),
            Self::Vsock(device, _) => device.clone(),
            Self::Blk(device) => device.clone(),
            Self::Net(_, device) => device.clone(),
        }
    }
}

impl DeviceState {
    /// What kind of device it is, for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Rng(_) => "virtio-rng",
            Self::Balloon(_) => "virtio-balloon",
            Self::Console(_) => "virtio-console",
            Self::Vsock { .. } => "virtio-vsock",
            Self::Blk(_) => "virtio-blk",
            Self::Net { .. } => "virtio-net",
        }
    }
}

fn check_ids(states: &[SlotState]) -> Result<(), VirtioError> {
    if states.len() > layout::VIRTIO_SLOTS {
        return Err(VirtioError::TooMany { count: states.len() });
    }
    for (index, SlotState { id, .. }) in states.iter().enumerate() {
        if parse_name(id).is_err() || states[..index].iter().any(|other| other.id == *id) {
            return Err(VirtioError::BadId(id.clone()));
        }
    }
    Ok(())
}
