//! The VM-wide state that KVM holds: timer chip, clock, interrupt controllers.
//!
//! In: a VM with all vCPUs stopped, or a state from a snapshot. Out: the other of the two. Holds: devices have raised
//! their last interrupt before the controllers are read, and the clock is set before any vCPU runs.

use crate::kvm::{During, Ioctl};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// What KVM holds for the machine as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// The 8254 timer.
    pub pit: kvm_pit_state2,
    /// kvmclock in nanoseconds; with the host's wall clock and TSC of that instant where KVM gives them.
    pub clock: kvm_clock_data,
    /// Both 8259s and the I/O APIC.
    pub irqchips: [kvm_irqchip; 3],
}

/// Reads it.
///
/// # Errors
/// The failed call.
pub fn save(vm: &VmFd) -> Result<VmState, Ioctl> {
    let pit = vm.get_pit2().during("KVM_GET_PIT2")?;
    let clock = vm.get_clock().during("KVM_GET_CLOCK")?;
    let mut irqchips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    for chip in &mut irqchips {
        vm.get_irqchip(chip).during("KVM_GET_IRQCHIP")?;
    }
    Ok(VmState { pit, clock, irqchips })
}

/// Writes it. The clock's flags are left out: the guest's time goes on from where it was, whatever the host's says.
///
/// # Errors
/// The failed call.
pub fn restore(vm: &VmFd, state: &VmState) -> Result<(), Ioctl> {
    vm.set_pit2(&state.pit).during("KVM_SET_PIT2")?;
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    vm.set_clock(&clock).during("KVM_SET_CLOCK")?;
    for (chip, chip_id) in state.irqchips.iter().zip(CHIPS) {
        vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip }).during("KVM_SET_IRQCHIP")?;
    }
    Ok(())
}
