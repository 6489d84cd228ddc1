//! Capture: a paused machine becomes plain data.
//!
//! In: a [`PausedMachine`]. Out: its [`MachineState`]. Holds: every vCPU stands still and has no I/O left to complete, so
//! the state is of one instant; RAM is not copied, it stays where it is for whoever saves or keeps it.

use crate::board::BoardState;
use crate::clock::Moment;
use crate::config::Shape;
use crate::kvm::Ioctl;
use crate::machine::PausedMachine;
use crate::vcpu_state::VcpuState;
use crate::vm_state::{self, VmState};
use serde::{Deserialize, Serialize};

/// All of a machine but its RAM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine is made of.
    pub shape: Shape,
    /// What KVM holds for the machine as a whole.
    pub vm: VmState,
    /// One state for each vCPU, in the order of their ids.
    pub vcpus: Vec<VcpuState>,
    /// The devices.
    pub board: BoardState,
}

impl PausedMachine<'_> {
    /// Reads the machine's state.
    ///
    /// Order: the timer chip and the interrupt controllers before the vCPUs, because the timer chip runs on while the vCPUs
    /// stand still, and an edge of it goes straight into a local APIC: one that was saved already would lose it, whereas a
    /// restored timer chip at worst repeats it. The devices finish what they have under way first, since that raises
    /// interrupts; afterwards they raise none, so the place of their states doesn't matter. An interrupt that is still on its
    /// way then is repeated by the restored device.
    ///
    /// # Errors
    /// The failed call.
    pub fn capture(&self) -> Result<MachineState, Ioctl> {
        let machine = self.machine();
        machine.board.drain();
        let now = Moment::read(&machine.vm, &machine.vcpus.threads[0].vcpu().fd)?;
        let vm = vm_state::save(&machine.vm, now.clock)?;
        let vcpus = self.vcpus().map(|vcpu| vcpu.save(&now)).collect::<Result<_, _>>()?;
        Ok(MachineState { shape: machine.shape.clone(), vm, vcpus, board: machine.board.save() })
    }
}
