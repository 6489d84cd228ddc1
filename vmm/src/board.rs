//! The board: which devices there are, at which addresses, on which lines.
//!
//! In: a VM to interrupt, the console's output, the devices' states. Out: two buses, and the states again. Holds: a device
//! is built from its state only; a new machine's devices are built from the states of devices after reset.

use crate::disk::Disk;
use crate::layout;
use crate::panic_watch::PanicWatch;
use crate::ram::GuestRam;
use crate::run_loop::Buses;
use crate::virtio::{SlotState, Virtio, VirtioError, VirtioHost};
use devices::{
    AcpiPm, Bus, BusDevice, BusError, ExitPort, Generation, GenerationHost, HostTime, I8042, Interrupt,
    PanicDevice, Persist, Rtc, Serial, SerialHost, VmGenId, lock,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::SystemTime;

/// The state of every device.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BoardState {
    /// COM1.
    pub serial: <Serial as Persist>::State,
    /// The keyboard controller.
    pub i8042: <I8042 as Persist>::State,
    /// ACPI sleep and reset registers.
    pub acpi_pm: <AcpiPm as Persist>::State,
    /// The panic device.
    pub panic: <PanicDevice as Persist>::State,
    /// The exit port.
    pub exit: <ExitPort as Persist>::State,
    /// The virtio devices, in the order of their windows.
    pub virtio: Vec<SlotState>,
    /// The real-time clock.
    pub rtc: <Rtc as Persist>::State,
    /// The VM generation id.
    pub generation: <VmGenId as Persist>::State,
}

/// Why a board could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// A device refused its state.
    #[error("{device}: {reason}")]
    State {
        /// Which.
        device: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// Two devices at one address: a mistake in the layout.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// What the board needs of the host.
pub struct BoardHost<'a> {
    /// Takes the interrupts.
    pub vm: Arc<VmFd>,
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// What is behind the disks.
    pub disks: &'a [Disk],
    /// Takes the console's output.
    pub console: Box<dyn Write + Send>,
    /// Called when the guest has read all its input.
    pub drained: Box<dyn Fn() + Send>,
    /// Whether the machine is cut off.
    pub alone: bool,
}

/// The devices, and the buses that lead to them.
pub struct Board {
    serial: Arc<Mutex<Serial>>,
    i8042: Arc<Mutex<I8042>>,
    panic: Arc<Mutex<PanicDevice>>,
    rtc: Arc<Mutex<Rtc>>,
    generation: Arc<Mutex<VmGenId>>,
    panicked: PanicWatch,
    virtio: Virtio,
    buses: Buses,
}

impl Board {
    /// Builds the devices and puts each where [`layout`] says.
    ///
    /// # Errors
    /// A state that its device refuses.
    pub fn from_state(state: &BoardState, host: BoardHost) -> Result<Self, BoardError> {
        let panicked = PanicWatch::default();
        let generation = device("VM generation id", &state.generation, generation_host(&host))?;
        let rtc = device("RTC", &state.rtc, host_time())?;
        let mut memory = Bus::new();
        let virtio_host = VirtioHost {
            vm: &host.vm,
            ram: host.ram,
            disks: host.disks,
            panicked: &panicked,
            alone: host.alone,
        };
        let virtio = Virtio::from_state(&state.virtio, &virtio_host, &mut memory)?;
        let serial = device("COM1", &state.serial, serial_host(host, panicked.clone()))?;
        let i8042 = device::<I8042>("i8042", &state.i8042, ())?;
        let panic = device("panic device", &state.panic, ())?;
        let acpi_pm = device::<AcpiPm>("ACPI registers", &state.acpi_pm, ())?;
        let exit = device::<ExitPort>("exit port", &state.exit, ())?;
        let mut ports = Bus::new();
        let mut put = |base: u16, len: u16, device: Arc<Mutex<dyn BusDevice>>| {
            ports.insert(u64::from(base), u64::from(len), device)
        };
        put(layout::COM1, layout::COM1_LEN, serial.clone())?;
        put(layout::I8042_DATA, layout::I8042_COMMAND - layout::I8042_DATA + 1, i8042.clone())?;
        put(layout::RTC, layout::RTC_LEN, rtc.clone())?;
        put(layout::PANIC_PORT, 1, panic.clone())?;
        put(layout::ACPI_PM, layout::ACPI_PM_LEN, acpi_pm)?;
        put(layout::EXIT_PORT, layout::EXIT_PORT_LEN, exit)?;
        let buses = Buses { ports: Arc::new(ports), memory: Arc::new(memory) };
        Ok(Self { serial, i8042, panic, rtc, generation, panicked, virtio, buses })
    }

    /// Every device's state. No vCPU may be running.
    pub fn save(&self) -> BoardState {
        BoardState {
            serial: lock(&self.serial).save(),
            i8042: lock(&self.i8042).save(),
            panic: lock(&self.panic).save(),
            acpi_pm: (),
            exit: (),
            virtio: self.virtio.save(),
            rtc: lock(&self.rtc).save(),
            generation: lock(&self.generation).save(),
        }
    }

    /// The socket file of the vsock device, if there is one.
    pub fn vsock_path(&self) -> Option<&Path> {
        self.virtio.vsock_path()
    }

    /// Lets the devices work that do so by themselves.
    pub fn run(&mut self) {
        self.virtio.run();
    }

    /// Has them stand still.
    pub fn pause(&mut self) {
        self.virtio.pause();
    }

    /// Finishes what they have under way in the host, as far as a bounded time allows. They and the vCPUs stand still.
    pub fn drain(&self) {
        self.virtio.drain();
    }

    /// Gives the guest a new generation id and tells it so. No vCPU may have run since the machine was put back.
    ///
    /// # Errors
    /// Guest memory can't be written, or KVM doesn't take the interrupt.
    pub fn renew_generation(&self, id: &Generation) -> io::Result<()> {
        lock(&self.generation).renew(id)
    }

    /// The way to the devices, for a vCPU.
    pub fn buses(&self) -> Buses {
        self.buses.clone()
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &Virtio {
        &self.virtio
    }

    /// Gives the console what `take` has for it, which is asked for as many bytes as there is room for. That is the virtio console
    /// once it has a driver, and COM1 otherwise. Does nothing while
    /// a vCPU has the port: one whose output nobody reads has it until it is kicked, and only the caller can kick it.
    pub fn feed_console(&self, take: impl FnOnce(usize) -> Vec<u8>) {
        if self.virtio.has_console() {
            return self.virtio.feed_console(take);
        }
        let mut serial = match self.serial.try_lock() {
            Ok(serial) => serial,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let bytes = take(serial.room());
        if !bytes.is_empty() {
            serial.enqueue(&bytes);
        }
    }

    /// Whether the guest's kernel has said on the console that it panicked.
    pub fn panic_seen(&self) -> bool {
        self.panicked.seen()
    }
}

fn device<D: Persist>(
    name: &'static str,
    state: &D::State,
    host: D::Host,
) -> Result<Arc<Mutex<D>>, BoardError> {
    let refused = |error: D::Error| BoardError::State { device: name, reason: error.to_string() };
    Ok(Arc::new(Mutex::new(D::from_state(state, host).map_err(refused)?)))
}

fn serial_host(host: BoardHost<'_>, watch: PanicWatch) -> SerialHost {
    let irq = Box::new(Line { vm: host.vm, gsi: layout::COM1_IRQ });
    SerialHost { irq, out: Box::new(watch.over(host.console)), drained: host.drained }
}

fn generation_host(host: &BoardHost) -> GenerationHost {
    let (ram, irq) = (host.ram.writer(), Box::new(Line { vm: host.vm.clone(), gsi: layout::GED_IRQ }));
    GenerationHost { publish: Box::new(move |id| ram.write(layout::GENERATION_ID, id)), irq }
}

fn host_time() -> HostTime {
    Box::new(|| SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// An edge-triggered line into the in-kernel controllers. The call is synchronous: after it the edge is in the
/// controllers' state, whereas an irqfd's edge may still be on its way when they are saved.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        let set = |active| {
            self.vm.set_irq_line(self.gsi, active).map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        set(true)?;
        set(false)
    }
}
