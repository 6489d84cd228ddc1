//! A kernel that boots beside the one that is awake, so that nobody has to wait for its boot.
//!
//! In: a kernel to boot. Out: one that sleeps, and takes over the machine when it is switched to. Holds: until then it has nothing of the
//! host's that another has: disks that can be written are stood in for, its networks have no wire, its vsock socket is its own.
//!
//! ```text
//!  boots, ready, waits ── captured ──► asleep, a stranger ── adopted ──► awake, with the ends of who was
//! ```

use super::sleeper::{Place, Ready, Sleeper};
use super::{KernelInfo, Kernels, Newcomer, Next, SwitchError};
use crate::clock::TimePolicy;
use crate::config::Shape;
use crate::disk::{Disk, DiskFile};
use crate::machine::Machine;
use crate::restore::HostEnds;
use crate::run_loop::Stop;
use crate::tail::Tail;
use crate::virtio::{DeviceState, SlotState};
use devices::lock;
use snapshot::Summary;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Added to the name of the vsock socket.
const SUFFIX: &str = ".beside";
/// What Linux says then.
const PANIC: &str = "Kernel panic";
/// Bytes of its console that are kept.
const LAST_WORDS: usize = 4096;

/// A kernel that runs beside, or has.
pub(super) struct Beside {
    name: String,
    source: PathBuf,
    shape: Shape,
    console: LastWords,
    /// Why it runs no more.
    state: Result<Machine, String>,
}

/// What a console puts out last.
#[derive(Clone)]
struct LastWords(Arc<Mutex<Tail>>);

impl Write for LastWords {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LastWords {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Tail::of(LAST_WORDS))))
    }

    /// The line that says that the kernel panicked, or else the last that says anything.
    fn line(&self) -> Option<String> {
        let mut lines = lock(&self.0).lines();
        let panic = lines.iter().find(|line| line.contains(PANIC)).cloned();
        panic.or_else(|| lines.pop())
    }
}

impl Beside {
    /// For a list.
    pub(super) fn info(&self) -> KernelInfo {
        let resident = self.state.as_ref().map_or(0, |machine| machine.ram().resident_bytes());
        let vsock = self.state.as_ref().ok().and_then(|machine| machine.board().vsock_path());
        KernelInfo {
            name: self.name.clone(),
            shape: self.shape.clone(),
            asleep: None,
            file: None,
            resident,
            beside: true,
            vsock: vsock.map(Path::to_owned),
            ended: self.state.as_ref().err().cloned(),
            on_trial: false,
        }
    }
}

impl Kernels {
    /// Boots a kernel beside the one that is awake. One that has ended there makes room for it.
    ///
    /// # Errors
    /// It can't be booted, or another runs beside already.
    pub fn boot_beside(&mut self, newcomer: &Newcomer) -> Result<KernelInfo, SwitchError> {
        self.check_can_be_kept()?;
        if let Some(Beside { name, state: Ok(_), .. }) = &self.beside {
            return Err(SwitchError::Busy(name.clone()));
        }
        self.beside = None;
        let Ready { name, source, mut state, ram, disks, .. } =
            self.prepare(&Next::Boot(Newcomer { image: None, ..newcomer.clone() }))?;
        let disks = disks.into_iter().map(stand_in).collect::<Result<_, _>>()?;
        state.board.virtio.iter_mut().for_each(apart);
        let console = LastWords::new();
        let ends = HostEnds {
            console: Box::new(console.clone()),
            drained: Box::new(|| ()),
            disks,
            seat: None,
            alone: true,
        };
        let mut machine = Machine::from_state(&self.kvm, &state, ram, TimePolicy::Freeze, ends)
            .map_err(|source| SwitchError::Wake { name: name.clone(), source })?;
        machine.resume();
        let beside = Beside { name, source, shape: state.shape, console, state: Ok(machine) };
        let info = beside.info();
        self.beside = Some(beside);
        Ok(info)
    }

    /// Becomes readable when [`Kernels::beside_stopped`] has something to say.
    pub fn beside_event(&self) -> Option<Arc<EventFd>> {
        let machine = self.beside.as_ref()?.state.as_ref().ok()?;
        Some(machine.stop_event())
    }

    /// Why the kernel that runs beside has stopped, if it has, and whether it said on its console that it panicked.
    pub fn beside_stopped(&mut self) -> Option<(Stop, bool)> {
        let machine = self.beside.as_mut()?.state.as_mut().ok()?;
        let _ = machine.stop_event().read();
        let stop = machine.stop_reason()?;
        Some((stop, machine.board().panic_seen()))
    }

    /// It is no more; what is left is `why`, with the last line of its console. Returns its name, and that.
    pub fn end_beside(&mut self, why: &str) -> Option<(String, String)> {
        let beside = self.beside.as_mut()?;
        let last = beside.console.line().map_or(String::new(), |line| format!("; its console said: {line}"));
        let why = format!("{why}{last}");
        if let Ok(machine) = std::mem::replace(&mut beside.state, Err(why.clone())) {
            machine.dismantle();
        }
        Some((beside.name.clone(), why))
    }

    /// Drops the kernel that runs beside, or has, if that is its name.
    pub(super) fn forget_beside(&mut self, name: &str) -> bool {
        if self.beside.as_ref().is_none_or(|beside| beside.name != name) {
            return false;
        }
        if let Some(Beside { state: Ok(machine), .. }) = self.beside.take() {
            machine.dismantle();
        }
        true
    }

    /// Writes the kernel of that name, which runs beside, to a file, from which it can be switched to again and again. What is recorded of
    /// its disks are those that are read-only: it has seen nothing of the others.
    ///
    /// # Errors
    /// There is none, or the file can't be written.
    pub fn save_beside(&mut self, name: &str, path: &Path) -> Result<Summary, SwitchError> {
        let found = self.beside.as_mut().filter(|beside| beside.name == name);
        let Some(Beside { state: Ok(machine), .. }) = found else {
            return Err(SwitchError::NotBeside(name.to_owned()));
        };
        let paused = machine.pause();
        if paused.has_ended() {
            return Err(SwitchError::NotBeside(name.to_owned()));
        }
        Ok(paused.save_apart(path)?)
    }

    /// Whether it runs beside under this name, or is not there at all.
    pub(super) fn is_beside(&self, name: &str) -> bool {
        self.beside.as_ref().is_some_and(|beside| beside.name == name)
    }

    /// Has the kernel that runs beside fall asleep, for it to be switched to. It is the first that fell asleep, so that it takes nobody's place by itself.
    pub(super) fn put_beside_to_bed(&mut self) -> Result<(), SwitchError> {
        let Some(Beside { name, source, state, .. }) = &mut self.beside else { return Ok(()) };
        let ended = |why: &str| SwitchError::EndedBeside { name: name.clone(), why: why.to_owned() };
        let machine = state.as_mut().map_err(|why| ended(why))?;
        let paused = machine.pause();
        if paused.has_ended() {
            return Err(ended("its guest has just asked for its end"));
        }
        let captured = paused.capture()?;
        paused.keep();
        let (name, source) = (name.clone(), source.clone());
        let Some(Beside { state: Ok(machine), .. }) = self.beside.take() else { return Ok(()) };
        let (ram, _) = machine.dismantle();
        let sleeper = Sleeper {
            name,
            source,
            state: captured,
            place: Place::Memory(ram),
            disks: Vec::new(),
            stamps: Vec::new(),
            since: Instant::now(),
            image: None,
            on_trial: false,
            stranger: true,
        };
        self.asleep.insert(0, sleeper);
        Ok(())
    }
}

fn stand_in(disk: Disk) -> Result<Disk, SwitchError> {
    if disk.file.read_only {
        return Ok(disk);
    }
    let file = DiskFile::stand_in(disk.file.size);
    let file = file.map_err(|source| SwitchError::StandIn { disk: disk.id.clone(), source })?;
    Ok(Disk { file, ..disk })
}

/// Its vsock socket is its own.
fn apart(slot: &mut SlotState) {
    if let DeviceState::Vsock { path, .. } = &mut slot.device {
        let mut name = std::mem::take(path).into_os_string();
        name.push(SUFFIX);
        *path = name.into();
    }
}
