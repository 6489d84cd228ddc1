//! The two ways to a machine: boot a kernel, or restore a snapshot. Both end in [`Machine::from_state`].
//!
//! In: files. Out: a paused machine. Holds: nothing has run when something is refused.

use crate::acpi;
use crate::boot::{self, BootError, BootSource, Entry, registers};
use crate::capture::MachineState;
use crate::clock::TimePolicy;
use crate::config::{self, ConfigError, Shape};
use crate::kvm::Ioctl;
use crate::layout;
use crate::load::{self, LoadError};
use crate::machine::Machine;
use crate::overrides::{OverrideError, Overrides};
use crate::ram::{GuestRam, RamError};
use crate::restore::{HostEnds, RestoreError};
use crate::vcpu_state::VcpuState;
use crate::virtio::SlotState;
use devices::{GENERATION_LEN, Generation};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_sregs2};
use kvm_ioctls::{Kvm, VmFd};
use rustix::rand::{GetRandomFlags, getrandom};
use snapshot::Snapshot;
use std::io;
use std::path::PathBuf;

/// Why no machine came to be.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The host is too small.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The kernel, its initrd or its command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The snapshot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What was to be taken in place of what the snapshot names.
    #[error(transparent)]
    Override(#[from] OverrideError),
    /// The host has no random bytes to tell the guest from its twins.
    #[error("cannot get random bytes for the VM's generation id")]
    Random(#[source] io::Error),
    /// The id can't be put into guest memory.
    #[error("cannot write the VM's generation id to guest RAM")]
    Generation(#[source] io::Error),
    /// A KVM call failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
    /// A state after reset that this host would not take.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A snapshot's state that this host, or a device, would not take.
    #[error("{}", path.display())]
    State {
        /// The snapshot.
        path: PathBuf,
        /// What would not be taken.
        source: RestoreError,
    },
}

/// Boots a kernel: RAM is filled as a firmware would, and the state after reset is changed to where the kernel starts.
///
/// # Errors
/// Files that can't be booted, or a host that can't run them.
pub fn boot(
    kvm: &Kvm,
    shape: Shape,
    devices: Vec<SlotState>,
    source: &BootSource,
    ends: HostEnds,
) -> Result<Machine, StartError> {
    let (state, ram) = prepare(kvm, shape, devices, source)?;
    Ok(Machine::from_state(kvm, &state, ram, TimePolicy::Freeze, ends)?)
}

/// The same, up to where the host's ends are needed: the state and the RAM of a machine that is about to enter its kernel.
///
/// # Errors
/// As [`boot()`].
pub fn prepare(
    kvm: &Kvm,
    mut shape: Shape,
    devices: Vec<SlotState>,
    source: &BootSource,
) -> Result<(MachineState, GuestRam), StartError> {
    config::check_host_memory(shape.memory)?;
    let ram = GuestRam::new(shape.memory)?;
    let boot = boot::load(ram.memory(), source, shape.memory, &acpi::tables(shape.vcpus, devices.len()))?;
    ram.writer().write(layout::GENERATION_ID, &generation()?).map_err(StartError::Generation)?;
    shape.kernel = boot.identity;
    let mut state = MachineState::at_reset(kvm, shape)?;
    state.board.virtio = devices;
    state.vcpus.iter_mut().for_each(as_firmware_leaves_it);
    enter(&mut state.vcpus[0], &boot.entry);
    Ok((state, ram))
}

/// Restores a snapshot, all of which but RAM has been checked, on this RAM, which holds what the snapshot has, in an empty VM, with some of the
/// host's ends replaced. Before the guest runs it gets a generation id of its own, since other machines may go on from the same snapshot.
///
/// # Errors
/// A host that lacks what the guest was promised, or won't take its state.
pub fn restore(
    (kvm, vm): (&Kvm, VmFd),
    snapshot: &Snapshot,
    ram: GuestRam,
    overrides: Overrides,
    time: TimePolicy,
    ends: HostEnds,
) -> Result<Machine, StartError> {
    let mut state = load::state(snapshot)?;
    overrides.apply(&mut state.board.virtio)?;
    load::check_host(kvm, snapshot, &state)?;
    let refused = |source| StartError::State { path: snapshot.path().to_owned(), source };
    let mut machine = Machine::on((kvm, vm), &state, ram, time, ends).map_err(refused)?;
    machine.generation = Some(generation()?);
    Ok(machine)
}

pub(crate) fn generation() -> Result<Generation, StartError> {
    let mut id = [0; GENERATION_LEN];
    // So few bytes come whole or not at all (getrandom(2)).
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| StartError::Random(error.into()))?;
    Ok(id)
}

fn as_firmware_leaves_it(vcpu: &mut VcpuState) {
    registers::configure_lapic(&mut vcpu.lapic);
    for msr in registers::boot_msrs() {
        vcpu.msrs.set(msr.index, msr.data);
    }
    let misc_enable = vcpu.msrs.get(registers::MISC_ENABLE).unwrap_or(0);
    vcpu.msrs.set(registers::MISC_ENABLE, misc_enable | registers::FAST_STRINGS);
}

fn enter(vcpu: &mut VcpuState, entry: &Entry) {
    let mut sregs = kvm_sregs2::from(vcpu.sregs);
    registers::configure_sregs(entry, &mut sregs);
    vcpu.sregs = sregs.into();
    vcpu.regs = registers::registers(entry);
    vcpu.mp_state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
}
