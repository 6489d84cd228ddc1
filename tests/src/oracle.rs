//! The oracle: restore, capture again at once, compare.
//!
//! In: two snapshots, the second taken of the first's machine before it ran. Out: agreement, or the first thing that
//! differs. Holds: all is compared, but for what moves by itself or is not written back on purpose, and each of these
//! stands here by name.

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use snapshot::Snapshot;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmm::board::BoardState;
use vmm::capture::MachineState;
use vmm::cpuid;
use vmm::load;
use vmm::vcpu_state::VcpuState;

const CHUNK: usize = snapshot::CHUNK_SIZE as usize;
/// The LAPIC timer's current count, which KVM derives from the time left: register 0x390 of the page.
const LAPIC_TIMER_COUNT: std::ops::Range<usize> = 0x390..0x394;
/// The processor priority: register 0xa0. It follows from the task priority and from what is in service, both of which are
/// compared. KVM works it out anew whenever it is read or needed, but shows it as it last was: after `KVM_SET_LAPIC` that is
/// without what is in service, which `kvm_apic_set_state` counts later.
const LAPIC_PROCESSOR_PRIORITY: std::ops::Range<usize> = 0xa0..0xa4;
/// MSRs that run by themselves: TSC, MPERF and APERF, Hyper-V's VP run time and time reference count.
const RUNNING_MSRS: [u32; 5] = [0x10, 0xe7, 0xe8, 0x4000_0010, 0x4000_0020];
/// Addresses of kvmclock's wall clock: a write is a command, so a restore leaves them out and a capture reads zero.
const WALL_CLOCK_MSRS: [u32; 2] = [0x11, 0x4b56_4d00];

/// SYSENTER_ESP and SYSENTER_EIP have 32 bits on AMD, where long mode has no `sysenter`: kvm_amd takes no more of them,
/// though it may tell more.
const AMD_SYSENTER_MSRS: [u32; 2] = [0x175, 0x176];

/// Compares the machine in `before` with the one in `after`.
///
/// # Errors
/// Names the vCPU or the part, and what it was and became.
pub fn same_machine(before: &Path, after: &Path) -> Result<()> {
    let (first, second) = (load::open(before)?, load::open(after)?);
    let (mut old, mut new) = (load::state(&first)?, load::state(&second)?);
    time_goes_on(&old, &new)?;
    [&mut old, &mut new].into_iter().for_each(still);
    same("shape", &old.shape, &new.shape)?;
    same("VM", &old.vm, &new.vm)?;
    same_devices(&old.board, &new.board)?;
    same("disks", &load::disks(&first)?, &load::disks(&second)?)?;
    for (index, (old, new)) in old.vcpus.iter().zip(&new.vcpus).enumerate() {
        same_vcpu(old, new).with_context(|| format!("vCPU {index}"))?;
    }
    same("RAM ranges", &first.manifest().ram.ranges, &second.manifest().ram.ranges)?;
    same_ram(&first, &second, &clocks(&old))
}

/// What moves may move forward only, and for all vCPUs alike.
fn time_goes_on(old: &MachineState, new: &MachineState) -> Result<()> {
    ensure!(new.vm.clock.clock >= old.vm.clock.clock, "kvmclock went back");
    let passed: Vec<_> =
        old.vcpus.iter().zip(&new.vcpus).map(|(old, new)| new.tsc.wrapping_sub(old.tsc)).collect();
    ensure!(passed.windows(2).all(|pair| pair[0] == pair[1]), "TSCs moved apart: {passed:?}");
    ensure!(passed[0] < 1 << 40, "the TSC jumped by {}", passed[0] as i64);
    Ok(())
}

/// Takes out what moves.
fn still(state: &mut MachineState) {
    state.vm.clock = Default::default();
    let amd = cpuid::vendor(&state.vcpus[0].cpuid) == "AuthenticAMD";
    state.vm.pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    for vcpu in &mut state.vcpus {
        vcpu.tsc = 0;
        vcpu.lapic.regs[LAPIC_TIMER_COUNT].fill(0);
        vcpu.lapic.regs[LAPIC_PROCESSOR_PRIORITY].fill(0);
        // An unusable segment's type means nothing; kvm_intel marks it as accessed.
        let unusable = vcpu.sregs.segments.iter_mut().filter(|segment| segment.unusable != 0);
        unusable.for_each(|segment| segment.type_ = 0);
        let halved = vcpu.msrs.saved.iter_mut().filter(|(index, _)| amd && AMD_SYSENTER_MSRS.contains(index));
        halved.for_each(|(_, value)| *value &= u64::from(u32::MAX));
        vcpu.msrs
            .saved
            .retain(|(index, _)| !RUNNING_MSRS.contains(index) && !WALL_CLOCK_MSRS.contains(index));
    }
}

fn same_devices(old: &BoardState, new: &BoardState) -> Result<()> {
    same("COM1", &old.serial, &new.serial)?;
    same("the keyboard controller", &old.i8042, &new.i8042)?;
    same("the ACPI registers", &old.acpi_pm, &new.acpi_pm)?;
    same("the panic device", &old.panic, &new.panic)?;
    same("the exit port", &old.exit, &new.exit)?;
    same("the RTC", &old.rtc, &new.rtc)?;
    same("the VM generation id", &old.generation, &new.generation)?;
    ensure!(
        old.virtio.len() == new.virtio.len(),
        "{} virtio devices, and then {}",
        old.virtio.len(),
        new.virtio.len()
    );
    for (old, new) in old.virtio.iter().zip(&new.virtio) {
        same(&format!("{} `{}`", old.device.kind(), old.id), old, new)?;
    }
    Ok(())
}

fn same_vcpu(old: &VcpuState, new: &VcpuState) -> Result<()> {
    same("CPUID", &old.cpuid, &new.cpuid)?;
    same("MP state", &old.mp_state, &new.mp_state)?;
    same("registers", &old.regs, &new.regs)?;
    same("segments and control registers", &old.sregs, &new.sregs)?;
    same("XSAVE area", &old.xsave, &new.xsave)?;
    same("XCR0", &old.xcrs, &new.xcrs)?;
    same("debug registers", &old.debug_regs, &new.debug_regs)?;
    same("LAPIC", &old.lapic, &new.lapic)?;
    same("TSC frequency", &old.tsc_khz, &new.tsc_khz)?;
    for (old, new) in old.msrs.saved.iter().zip(&new.msrs.saved) {
        ensure!(old == new, "MSR {:#x} was {:#x} and is {:#x} (of MSR {:#x})", old.0, old.1, new.1, new.0);
    }
    same("skipped MSRs", &old.msrs.skipped, &new.msrs.skipped)?;
    same("events", &old.events, &new.events)
}

/// As encoded, since KVM's structs do not all compare.
fn same<T: Serialize>(what: &str, old: &T, new: &T) -> Result<()> {
    let (old, new) = (postcard::to_stdvec(old)?, postcard::to_stdvec(new)?);
    let differing: Vec<_> = (0..old.len().max(new.len())).filter(|&at| old.get(at) != new.get(at)).collect();
    let Some(&at) = differing.first() else { return Ok(()) };
    let around = |bytes: &[u8]| bytes.get(at..bytes.len().min(at + 16)).map(<[u8]>::to_vec);
    bail!(
        "{what} differs in {} bytes, from {at} on: {:x?} became {:x?}",
        differing.len(),
        around(&old),
        around(&new)
    )
}

/// Both tables were made while the RAM was read, so equal digests are equal chunks. Within a chunk that differs, only the
/// clock structures may, which are KVM's to rewrite whenever it is told of them.
fn same_ram(first: &Snapshot, second: &Snapshot, clocks: &[Range<u64>]) -> Result<()> {
    let chunks = first
        .ram()
        .iter()
        .flat_map(|mapped| (0..mapped.range.len).step_by(CHUNK).map(move |at| (mapped, at)));
    for ((mapped, at), (old, new)) in chunks.zip(first.digests().iter().zip(second.digests())) {
        if old != new {
            let len = (mapped.range.len - at).min(CHUNK as u64);
            same_bytes(first, second, mapped.offset + at, mapped.range.gpa + at, len, clocks)?;
        }
    }
    Ok(())
}

fn same_bytes(
    first: &Snapshot,
    second: &Snapshot,
    offset: u64,
    gpa: u64,
    len: u64,
    clocks: &[Range<u64>],
) -> Result<()> {
    let read = |snapshot: &Snapshot| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        snapshot.file().read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    };
    let (old, new) = (read(first)?, read(second)?);
    let differing = (gpa..).zip(old.iter().zip(&new)).filter(|(_, (old, new))| old != new);
    let mut unexpected = differing.filter(|(gpa, _)| !clocks.iter().any(|clock| clock.contains(gpa)));
    match unexpected.next() {
        Some((gpa, (old, new))) => bail!("RAM at {gpa:#x} was {old:#x} and is {new:#x}"),
        None => Ok(()),
    }
}

/// Each vCPU's `pvclock_vcpu_time_info`, 32 bytes, at the address in MSR_KVM_SYSTEM_TIME_NEW (or the old number).
fn clocks(state: &MachineState) -> Vec<Range<u64>> {
    let addresses = state.vcpus.iter().flat_map(|vcpu| [0x12, 0x4b56_4d01].map(|index| vcpu.msrs.get(index)));
    addresses.flatten().filter(|address| address & 1 != 0).map(|address| address - 1..address + 31).collect()
}
