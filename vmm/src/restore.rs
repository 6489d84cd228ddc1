//! Restore: plain data and RAM become a machine. A boot is a restore of the state after reset.
//!
//! In: a [`MachineState`], guest RAM, the host's ends. Out: a paused [`Machine`]. Holds: this is the only way to a machine.

use crate::board::{Board, BoardError, BoardHost, BoardState};
use crate::capture::MachineState;
use crate::config::Shape;
use crate::cpuid;
use crate::disk::Disk;
use crate::kvm::Ioctl;
use crate::machine::{Machine, Vcpus};
use crate::msr;
use crate::ram::GuestRam;
use crate::run_loop::Buses;
use crate::vcpu::{self, Vcpu};
use crate::vcpu_state::{HostTsc, HostVcpu, VcpuState, VcpuStateError};
use crate::vcpu_thread::{Reports, VcpuThread};
use crate::vm;
use crate::vm_state;
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
}

impl Machine {
    /// Builds a machine with this state on this RAM. It is paused.
    ///
    /// Order: memory slots, interrupt controllers, vCPUs and their states, then timer chip, clock and controllers' state,
    /// the clock thus before any vCPU runs; the devices last.
    ///
    /// # Errors
    /// Whatever this host's KVM, or a device, would not take.
    pub fn from_state(
        kvm: &Kvm,
        state: &MachineState,
        ram: GuestRam,
        ends: HostEnds,
    ) -> Result<Self, RestoreError> {
        let vm = vm::create(kvm, Some(&ram))?;
        let host = Arc::new(vm::host_vcpu(&vm, msr::list(kvm)?));
        let vcpus = restore_vcpus(&vm, state, &host)?;
        vm_state::restore(&vm, &state.vm)?;
        let board_host = BoardHost {
            vm: vm.clone(),
            ram: &ram,
            disks: &ends.disks,
            console: ends.console,
            drained: ends.drained,
        };
        let board = Board::from_state(&state.board, board_host)?;
        let vcpus = start_threads(vcpus, &board.buses()).map_err(RestoreError::Thread)?;
        Ok(Self {
            vcpus,
            board,
            vm,
            ram,
            disks: ends.disks,
            shape: state.shape.clone(),
            started: Instant::now(),
            paused: true,
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
        let now = HostTsc::default();
        let vcpu = |index| {
            let cpuid = cpuid::for_vcpu(&supported, index, shape.vcpus);
            Vcpu::new(&vm, index, host.clone(), cpuid)?.save(&now)
        };
        let vcpus = (0..shape.vcpus).map(vcpu).collect::<Result<_, _>>()?;
        Ok(Self { vm: vm_state::save(&vm)?, vcpus, board: BoardState::default(), shape })
    }
}

fn restore_vcpus(vm: &VmFd, state: &MachineState, host: &Arc<HostVcpu>) -> Result<Vec<Vcpu>, RestoreError> {
    if state.vcpus.len() != state.shape.vcpus as usize {
        return Err(RestoreError::Vcpus { vcpus: state.vcpus.len(), shape: state.shape.vcpus });
    }
    let make = |(index, vcpu): (u32, &VcpuState)| Vcpu::new(vm, index, host.clone(), vcpu.cpuid.clone());
    let vcpus = (0..).zip(&state.vcpus).map(make).collect::<Result<Vec<_>, _>>()?;
    let now = HostTsc::default();
    for (index, (vcpu, state)) in vcpus.iter().zip(&state.vcpus).enumerate() {
        vcpu.restore(state, &now).map_err(|source| RestoreError::Vcpu { index, source })?;
    }
    Ok(vcpus)
}

fn start_threads(vcpus: Vec<Vcpu>, buses: &Buses) -> io::Result<Vcpus> {
    vcpu::install_kick_handler()?;
    let (sender, reports) = channel();
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let report_to = Reports { sender, event: event.clone() };
    let start = |(index, vcpu)| VcpuThread::new(index as u32, vcpu, buses.clone(), report_to.clone());
    let threads = vcpus.into_iter().enumerate().map(start).collect::<io::Result<_>>()?;
    Ok(Vcpus { threads, reports, event, running: 0, stop: None })
}
