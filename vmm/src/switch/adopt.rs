//! A kernel from elsewhere takes the place of the one that is awake: its RAM and state, that one's ends of the host.
//!
//! In: the state of a machine that never had these ends, and the machine that has them. Out: the state, on them, and the disks. Holds:
//! it finds the devices that it knows, and no disk that it has read was written since.

use crate::capture::MachineState;
use crate::disk::{Disk, DiskRecord};
use crate::machine::Machine;
use crate::virtio::{DeviceState, SlotState};
use devices::virtio::{BlkState, Mac};
use std::io;

/// Why a kernel can't have the machine.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A device that isn't here.
    #[error("it has {kind} `{id}`, and this VM has not")]
    NotHere {
        /// What it is.
        kind: &'static str,
        /// What it is called.
        id: String,
    },
    /// A device that isn't there.
    #[error("this VM has {kind} `{id}`, and it has not")]
    NotThere {
        /// What it is.
        kind: &'static str,
        /// What it is called.
        id: String,
    },
    /// Another disk.
    #[error("its disk `{id}` has {there} bytes, and that of this VM {here}")]
    Size {
        /// The disk's id.
        id: String,
        /// Bytes that the kernel knows.
        there: u64,
        /// Bytes that there are.
        here: u64,
    },
    /// A disk that may be written there and not here, or the other way round.
    #[error("its disk `{id}` is {}, and that of this VM is not", if *.read_only { "read-only" } else { "writable" })]
    ReadOnly {
        /// The disk's id.
        id: String,
        /// Whether it is, there.
        read_only: bool,
    },
    /// A disk that it may write, but was not given.
    #[error("it has a writable disk `{0}`, which another kernel uses: --share-disks gives it that too")]
    NotShared(String),
    /// A disk of which it may have something in its memory.
    #[error("disk `{0}` was written since")]
    Written(String),
    /// A disk can't be looked at.
    #[error("disk `{id}`: cannot see whether it was written since")]
    Stamp {
        /// The disk's id.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// Its driver would go on with the other address.
    #[error("its network device `{id}` has the address {there}, and that of this VM {here}")]
    Mac {
        /// The device's id.
        id: String,
        /// The address that the kernel knows.
        there: Mac,
        /// The address that there is.
        here: Mac,
    },
}

/// Puts the state on the machine's ends. `records` tell what its disks were; one that there is no record of was never its.
pub(super) fn adopt(
    state: &mut MachineState,
    records: &[DiskRecord],
    machine: &Machine,
    share_disks: bool,
) -> Result<Vec<Disk>, AdoptError> {
    let here = machine.board().virtio().save();
    same_devices(&state.board.virtio, &here)?;
    state.shape.name.clone_from(&machine.shape().name);
    let mut disks = Vec::new();
    for slot in &mut state.board.virtio {
        let Some(own) = here.iter().find(|own| own.id == slot.id) else { continue };
        let id = slot.id.clone();
        match (&mut slot.device, &own.device) {
            (DeviceState::Vsock { path, .. }, DeviceState::Vsock { path: here, .. }) => path.clone_from(here),
            (DeviceState::Net { tap, state }, DeviceState::Net { tap: here, state: own }) => {
                same_address(&id, state.device.mac, own.device.mac)?;
                tap.clone_from(here);
            }
            (DeviceState::Blk(state), DeviceState::Blk(_)) => {
                let disk = machine.disks.iter().find(|disk| disk.id == id);
                let disk = disk.ok_or_else(|| AdoptError::NotHere { kind: "disk", id: id.clone() })?;
                same_disk(disk, &state.device, share_disks)?;
                unwritten(disk, records)?;
                disks.push(disk.clone());
            }
            _ => {}
        }
    }
    Ok(disks)
}

/// A disk of the VM need not be there: a kernel that was booted beside has none that it does not share.
fn same_devices(there: &[SlotState], here: &[SlotState]) -> Result<(), AdoptError> {
    let is_in = |slots: &[SlotState], wanted: &SlotState| {
        slots.iter().any(|slot| slot.id == wanted.id && slot.device.kind() == wanted.device.kind())
    };
    if let Some(SlotState { id, device }) = there.iter().find(|slot| !is_in(here, slot)) {
        return Err(AdoptError::NotHere { kind: device.kind(), id: id.clone() });
    }
    match here.iter().find(|slot| !slot.is_disk() && !is_in(there, slot)) {
        Some(SlotState { id, device }) => Err(AdoptError::NotThere { kind: device.kind(), id: id.clone() }),
        None => Ok(()),
    }
}

fn same_disk(disk: &Disk, there: &BlkState, share: bool) -> Result<(), AdoptError> {
    let id = disk.id.clone();
    if there.size != disk.file.size {
        return Err(AdoptError::Size { id, there: there.size, here: disk.file.size });
    }
    if there.read_only != disk.file.read_only {
        return Err(AdoptError::ReadOnly { id, read_only: there.read_only });
    }
    if !share && !there.read_only { Err(AdoptError::NotShared(id)) } else { Ok(()) }
}

fn unwritten(disk: &Disk, records: &[DiskRecord]) -> Result<(), AdoptError> {
    let Some(record) = records.iter().find(|record| record.id == disk.id) else { return Ok(()) };
    match record.is_of(&disk.file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(AdoptError::Written(disk.id.clone())),
        Err(source) => Err(AdoptError::Stamp { id: disk.id.clone(), source }),
    }
}

fn same_address(id: &str, there: Mac, here: Mac) -> Result<(), AdoptError> {
    if there == here { Ok(()) } else { Err(AdoptError::Mac { id: id.to_owned(), there, here }) }
}
