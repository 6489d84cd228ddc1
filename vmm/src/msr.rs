//! Model-specific registers: which there are, and how each is saved or said to be skipped.
//!
//! In: KVM's list for this host, a vCPU. Out: values, and the indices that could not be read. Holds: no register is lost
//! in silence; the timer deadline is not among them, because it must be written last of all.

use crate::kvm::{During, Ioctl};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: the LAPIC timer's next expiry in guest TSC ticks, zero when unarmed.
pub const TSC_DEADLINE: u32 = 0x6e0;

/// Wall clock addresses of kvmclock (old and new number). A write is a command, to put the time into guest memory now; KVM
/// promises the guest no later write (Documentation/virt/kvm/x86/msr.rst), so by now that memory may hold something else.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Where kvmclock tells the time (old and new number), and the bit that has it do so.
const SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];
const SYSTEM_TIME_ON: u64 = 1;

/// Registers in one call: as many as KVM takes.
const BATCH: usize = 255;

/// Held by KVM for each vCPU but left out of `KVM_GET_MSR_INDEX_LIST`: the MTRRs (variable, fixed, default type).
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// Also left out: the machine check banks, four registers each.
const MACHINE_CHECK_BANKS: std::ops::Range<u32> = 0x400..0x480;

/// A vCPU's registers as read, and what could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrState {
    /// Index and value.
    pub saved: Vec<(u32, u64)>,
    /// On the host's list, but not readable on this vCPU.
    pub skipped: Vec<u32>,
}

/// A register that would not take its saved value.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// KVM refused the write, and the register holds something else.
    #[error("MSR {index:#x} does not take its saved value {value:#x} on this host")]
    Refused {
        /// The register.
        index: u32,
        /// The value that it had.
        value: u64,
    },
    /// The call itself failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
}

impl MsrState {
    /// The saved value of one register.
    pub fn get(&self, index: u32) -> Option<u64> {
        self.saved.iter().find(|(i, _)| *i == index).map(|(_, value)| *value)
    }

    /// Changes a saved value, or adds one.
    pub fn set(&mut self, index: u32, value: u64) {
        match self.saved.iter_mut().find(|(i, _)| *i == index) {
            Some(entry) => entry.1 = value,
            None => self.saved.push((index, value)),
        }
    }
}

/// Whether a guest with these has a kvmclock.
pub fn has_kvmclock(state: &MsrState) -> bool {
    SYSTEM_TIME.iter().any(|index| state.get(*index).is_some_and(|value| value & SYSTEM_TIME_ON != 0))
}

/// Every register that a vCPU of this host may hold: KVM's list, the MTRRs, the machine check banks.
///
/// # Errors
/// The failed call.
pub fn list(kvm: &Kvm) -> Result<Vec<u32>, Ioctl> {
    let listed = kvm.get_msr_index_list().during("KVM_GET_MSR_INDEX_LIST")?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend(
        MTRRS.into_iter().chain(MACHINE_CHECK_BANKS).filter(|index| !listed.as_slice().contains(index)),
    );
    Ok(indices)
}

/// Reads the registers in as few calls as KVM allows: it stops at the first that it can't read, and is asked again for
/// those after it.
///
/// # Errors
/// The failed call.
pub fn save(vcpu: &VcpuFd, list: &[u32]) -> Result<MsrState, Ioctl> {
    let mut state = MsrState::default();
    let mut rest = list;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let mut msrs = entries(batch.iter().map(|&index| (index, 0)));
        let read = vcpu.get_msrs(&mut msrs).during("KVM_GET_MSRS")?;
        state.saved.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        let failed = batch.get(read);
        state.skipped.extend(failed);
        rest = &rest[read + usize::from(failed.is_some())..];
    }
    Ok(state)
}

/// Writes the registers. The TSC and its deadline are left to the caller, who knows their order; the wall clock's address
/// is not written at all.
///
/// # Errors
/// A register that can't be given its value, unless it has it anyway (some are read-only and alike on every vCPU). One
/// that is not there on this host, whose kernel may be older, has zero.
pub fn restore(vcpu: &VcpuFd, state: &MsrState) -> Result<(), MsrError> {
    let apart = |index| [TSC, TSC_DEADLINE].contains(&index) || WALL_CLOCK.contains(&index);
    let wanted: Vec<_> = state.saved.iter().copied().filter(|&(index, _)| !apart(index)).collect();
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let written = vcpu.set_msrs(&entries(batch.iter().copied())).during("KVM_SET_MSRS")?;
        let failed = batch.get(written);
        if let Some(&(index, value)) = failed {
            already_holds(vcpu, index, value)?;
        }
        rest = &rest[written + usize::from(failed.is_some())..];
    }
    Ok(())
}

/// Writes one register.
///
/// # Errors
/// When KVM refuses.
pub fn write(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), MsrError> {
    let written = vcpu.set_msrs(&entries([(index, value)].into_iter())).during("KVM_SET_MSRS")?;
    if written == 1 { Ok(()) } else { Err(MsrError::Refused { index, value }) }
}

fn already_holds(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), MsrError> {
    let held = save(vcpu, &[index])?.get(index).unwrap_or(0);
    if held == value { Ok(()) } else { Err(MsrError::Refused { index, value }) }
}

fn entries(list: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entries: Vec<_> =
        list.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is shorter than KVM's limit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvmclock_is_there_when_its_address_is_on() {
        let of = |index, value| MsrState { saved: vec![(TSC, 1), (index, value)], skipped: Vec::new() };
        for index in SYSTEM_TIME {
            assert!(has_kvmclock(&of(index, 0x1001)) && !has_kvmclock(&of(index, 0x1000)));
        }
        assert!(!has_kvmclock(&of(WALL_CLOCK[0], 0x1001)));
    }
}
