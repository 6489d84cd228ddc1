//! Restore: plain data and RAM become a machine. A boot is a restore of the state after reset.
//!
//! In: a [`MachineState`], guest RAM, the host's ends. Out: a paused [`Machine`]. Holds: this is the only way to a machine.

use crate::board::{Board, BoardError, BoardHost, BoardState};
use crate::capture::MachineState;
use crate::clock::{self, Moment, TimePolicy};
use crate::config::Shape;
use crate::cpuid;
use crate::disk::Disk;
use crate::kvm::Ioctl;
use crate::machine::{Machine, Vcpus};
use crate::msr;
use crate::ram::GuestRam;
use crate::run_loop::Buses;
use crate::timing::FirstRun;
use crate::vcpu::{self, Vcpu};
use crate::vcpu_state::{HostVcpu, VcpuState, VcpuStateError};
use crate::vcpu_thread::{Reports, Seat, VcpuThread};
use crate::vm;
use crate::vm_state;
use crate::vmcoreinfo::Place;
use kvm_ioctls::{Kvm, VmFd};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Why a state did not become a machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A KVM call failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
    /// A vCPU would not take its state.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        source: VcpuStateError,
    },
    /// A device would not take its state.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The parts don't fit each other.
    #[error("{vcpus} vCPU states for a machine with {shape} vCPUs")]
    Vcpus {
        /// States there are.
        vcpus: usize,
        /// vCPUs there should be.
        shape: u32,
    },
    /// The host has no thread or event to give.
    #[error("cannot start a vCPU's thread: {0}")]
    Thread(#[source] io::Error),
}

/// The host's ends of a machine.
pub struct HostEnds {
    /// Takes what the guest writes to its console.
    pub console: Box<dyn Write + Send>,
    /// Called when the guest has read all its console input.
    pub drained: Box<dyn Fn() + Send>,
    /// What is behind the disks, by id.
    pub disks: Vec<Disk>,
    /// The thread that the first vCPU is to have, if it is not to be one of its own.
    pub seat: Option<Seat>,
    /// Whether the machine is cut off: its networks have no wire, and what its virtio console puts out is dropped.
    pub alone: bool,
}

impl Machine {
    /// As [`Machine::on`], on a VM that is made for it now.
    ///
    /// # Errors
    /// Whatever this host's KVM, or a device, would not take.
    pub fn from_state(
        kvm: &Kvm,
        state: &MachineState,
        ram: GuestRam,
        time: TimePolicy,
        ends: HostEnds,
    ) -> Result<Self, RestoreError> {
        Self::on((kvm, vm::empty(kvm)?), state, ram, time, ends)
    }

    /// Builds a machine with this state on this RAM, in an empty VM. So much time has passed in it as the policy says. It is paused.
    ///
    /// Order: memory slots, interrupt controllers, vCPUs; then the clock, from which the TSCs among the vCPUs' states
    /// follow; then timer chip and controllers' state; the devices last.
    ///
    /// # Errors
    /// Whatever this host's KVM, or a device, would not take.
    pub fn on(
        (kvm, vm): (&Kvm, VmFd),
        state: &MachineState,
        ram: GuestRam,
        time: TimePolicy,
        ends: HostEnds,
    ) -> Result<Self, RestoreError> {
        // Whoever had the RAM before watched it in another VM.
        ram.end_epochs();
        let vm = vm::furnish(vm, Some(&ram))?;
        let host = Arc::new(vm::host_vcpu(&vm, msr::list(kvm)?));
        let vcpus = restore_vcpus(&vm, state, &host, time)?;
        vm_state::restore(&vm, &state.vm)?;
        let board_host = BoardHost {
            vm: vm.clone(),
            ram: &ram,
            disks: &ends.disks,
            console: ends.console,
            drained: ends.drained,
            alone: ends.alone,
        };
        let board = Board::from_state(&state.board, board_host)?;
        let vcpus = start_threads(ends.seat, vcpus, &board.buses()).map_err(RestoreError::Thread)?;
        Ok(Self {
            vcpus,
            board,
            log: None,
            vm,
            ram,
            disks: ends.disks,
            vmcoreinfo: Place::default(),
            shape: state.shape.clone(),
            started: Instant::now(),
            paused: true,
            generation: None,
            when_run: Vec::new(),
        })
    }
}

impl MachineState {
    /// The state of a machine of this shape after reset: KVM's own, read from a VM that never runs.
    ///
    /// # Errors
    /// The failed call.
    pub fn at_reset(kvm: &Kvm, shape: Shape) -> Result<Self, Ioctl> {
        let supported = cpuid::supported(kvm)?;
        let vm = vm::create(kvm, None)?;
        let host = Arc::new(vm::host_vcpu(&vm, msr::list(kvm)?));
        let vcpu =
            |index| Vcpu::new(&vm, index, host.clone(), cpuid::for_vcpu(&supported, index, shape.vcpus));
        let vcpus = (0..shape.vcpus).map(vcpu).collect::<Result<Vec<_>, _>>()?;
        let now = Moment::read(&vm, &vcpus[0].fd)?;
        let vcpus = vcpus.iter().map(|vcpu| vcpu.save(&now)).collect::<Result<_, _>>()?;
        Ok(Self { vm: vm_state::save(&vm, now.clock)?, vcpus, board: BoardState::default(), shape })
    }
}

fn restore_vcpus(
    vm: &VmFd,
    state: &MachineState,
    host: &Arc<HostVcpu>,
    time: TimePolicy,
) -> Result<Vec<Vcpu>, RestoreError> {
    if state.vcpus.len() != state.shape.vcpus as usize {
        return Err(RestoreError::Vcpus { vcpus: state.vcpus.len(), shape: state.shape.vcpus });
    }
    let make = |(index, vcpu): (u32, &VcpuState)| Vcpu::new(vm, index, host.clone(), vcpu.cpuid.clone());
    let vcpus = (0..).zip(&state.vcpus).map(make).collect::<Result<Vec<_>, _>>()?;
    let each = |put: &dyn Fn(&Vcpu, &VcpuState) -> Result<(), VcpuStateError>| {
        let mut pairs = vcpus.iter().zip(&state.vcpus).enumerate();
        pairs.try_for_each(|(index, (vcpu, state))| {
            put(vcpu, state).map_err(|source| RestoreError::Vcpu { index, source })
        })
    };
    each(&|vcpu, state| vcpu.restore_tsc_frequency(state))?;
    clock::set(vm, &state.vm.clock, time)?;
    let unscaled = state.vcpus.iter().all(|vcpu| host.has_tsc_of(vcpu));
    let now = now(vm, &vcpus[0], unscaled)?;
    let passed = now.since(&state.vm.clock);
    each(&|vcpu, state| vcpu.restore(state, &now, passed))?;
    Ok(vcpus)
}

/// By the shortest way that there is.
fn now(vm: &VmFd, vcpu: &Vcpu, unscaled: bool) -> Result<Moment, Ioctl> {
    let told = if unscaled { Moment::of_unscaled(vm)? } else { None };
    told.map_or_else(|| Moment::read(vm, &vcpu.fd), Ok)
}

fn start_threads(first: Option<Seat>, vcpus: Vec<Vcpu>, buses: &Buses) -> io::Result<Vcpus> {
    vcpu::install_kick_handler()?;
    let (sender, reports) = channel();
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let first_run = Arc::new(FirstRun::default());
    let report_to = Reports { sender, event: event.clone(), first_run: first_run.clone() };
    let given = first.into_iter().map(Ok);
    let own = (given.len() as u32..vcpus.len() as u32).map(Seat::new);
    let seats = given.chain(own).collect::<io::Result<Vec<_>>>()?;
    let start = |(seat, vcpu)| VcpuThread::new(seat, vcpu, buses.clone(), report_to.clone());
    let threads = seats.into_iter().zip(vcpus).map(start).collect();
    let alarm = Arc::default();
    Ok(Vcpus { threads, reports, event, first_run, alarm, running: 0, stop: None })
}
