//! The VM-wide state that KVM holds: timer chip, clock, interrupt controllers.
//!
//! In: a VM with all vCPUs stopped, or a state from a snapshot. Out: the other of the two. Holds: devices have raised
//! their last interrupt before the controllers are read. The clock is read and set with the vCPUs' TSCs, in `clock.rs`.

use crate::clock::ClockState;
use crate::kvm::{During, Ioctl};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// What KVM holds for the machine as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// The 8254 timer.
    pub pit: kvm_pit_state2,
    /// kvmclock, and the host's wall clock of that instant.
    pub clock: ClockState,
    /// Both 8259s and the I/O APIC.
    pub irqchips: [kvm_irqchip; 3],
}

/// Reads it, all but `clock`.
///
/// # Errors
/// The failed call.
pub fn save(vm: &VmFd, clock: ClockState) -> Result<VmState, Ioctl> {
    let pit = vm.get_pit2().during("KVM_GET_PIT2")?;
    let mut irqchips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    for chip in &mut irqchips {
        vm.get_irqchip(chip).during("KVM_GET_IRQCHIP")?;
    }
    Ok(VmState { pit, clock, irqchips })
}

/// Writes it, all but the clock.
///
/// # Errors
/// The failed call.
pub fn restore(vm: &VmFd, state: &VmState) -> Result<(), Ioctl> {
    vm.set_pit2(&state.pit).during("KVM_SET_PIT2")?;
    for (chip, chip_id) in state.irqchips.iter().zip(CHIPS) {
        vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip }).during("KVM_SET_IRQCHIP")?;
    }
    Ok(())
}
