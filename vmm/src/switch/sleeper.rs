//! A kernel that sleeps.
//!
//! In: what is left of a machine that was taken apart. Out: all it takes to make it again. Holds: one whose disk another wrote to
//! does not wake up.

use super::image::Image;
use super::{KernelInfo, SwitchError};
use crate::capture::MachineState;
use crate::clock::TimePolicy;
use crate::disk::{Disk, DiskFile, Stamp};
use crate::load;
use crate::ram::GuestRam;
use crate::start;
use devices::Generation;
use snapshot::Snapshot;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

/// What is left of a kernel that sleeps: all of it.
pub(super) struct Sleeper {
    pub(super) name: String,
    pub(super) source: PathBuf,
    pub(super) state: MachineState,
    pub(super) place: Place,
    pub(super) disks: Vec<Disk>,
    /// What its writable disks looked like, if another may write to them.
    pub(super) stamps: Vec<(String, Option<Stamp>)>,
    pub(super) since: Instant,
    /// Of an image kernel, which sleeps only until it turns out that the next one runs.
    pub(super) image: Option<Image>,
    /// Whether it is on trial, and so sleeps no longer than an image kernel.
    pub(super) on_trial: bool,
    /// Whether it has never had the machine: its disks and the rest are those of who is awake when it wakes up.
    pub(super) stranger: bool,
}

/// Where a sleeper's RAM is.
pub(super) enum Place {
    Memory(GuestRam),
    /// Held open: whoever removes or replaces it by name takes nothing from the sleeper.
    File(Box<Snapshot>),
}

/// All a kernel needs to run, but the host's ends.
pub(super) struct Ready {
    pub(super) name: String,
    pub(super) source: PathBuf,
    pub(super) state: MachineState,
    pub(super) ram: GuestRam,
    pub(super) time: TimePolicy,
    pub(super) disks: Vec<Disk>,
    /// The id by which it learns that it may have twins: what slept in a file may have been restored from it elsewhere.
    pub(super) generation: Option<Generation>,
    /// Whether it is on trial.
    pub(super) on_trial: bool,
    /// Whether it has never had the machine.
    pub(super) is_new: bool,
}

impl Sleeper {
    /// All it needs to run, if its disks are as they were.
    pub(super) fn ready(&self, time: TimePolicy) -> Result<Ready, SwitchError> {
        self.check_disks()?;
        let generation = match &self.place {
            Place::Memory(_) => None,
            Place::File(_) => Some(start::generation()?),
        };
        let ram = self.ram()?;
        let (name, source, disks) = (self.name.clone(), self.source.clone(), self.disks.clone());
        let (state, on_trial) = (self.state.clone(), self.on_trial);
        Ok(Ready { name, source, state, ram, time, disks, generation, on_trial, is_new: self.stranger })
    }

    /// Its RAM.
    pub(super) fn ram(&self) -> Result<GuestRam, SwitchError> {
        match &self.place {
            Place::Memory(ram) => Ok(ram.clone()),
            Place::File(snapshot) => Ok(load::ram(snapshot)?),
        }
    }

    /// Notes what its writable disks look like, since another may write to them now.
    pub(super) fn stamp(&mut self) -> Result<(), SwitchError> {
        let writable = self.disks.iter().filter(|disk| !disk.file.read_only);
        let stamped = writable.map(|disk| look(disk, Stamp::settled).map(|stamp| (disk.id.clone(), stamp)));
        self.stamps = stamped.collect::<Result<_, _>>()?;
        Ok(())
    }

    pub(super) fn check_disks(&self) -> Result<(), SwitchError> {
        for (id, then) in &self.stamps {
            let Some(disk) = self.disks.iter().find(|disk| disk.id == *id) else { continue };
            if then.is_none() || look(disk, Stamp::of)? != *then {
                return Err(SwitchError::Stale { name: self.name.clone(), disk: id.clone() });
            }
        }
        Ok(())
    }

    /// For a list.
    pub(super) fn info(&self) -> KernelInfo {
        let (file, resident) = match &self.place {
            Place::Memory(ram) => (None, ram.resident_bytes()),
            Place::File(snapshot) => (Some(snapshot.path().to_owned()), 0),
        };
        let (name, shape) = (self.name.clone(), self.state.shape.clone());
        let asleep = Some(self.since.elapsed());
        KernelInfo {
            name,
            shape,
            asleep,
            file,
            resident,
            beside: false,
            vsock: None,
            ended: None,
            on_trial: false,
        }
    }
}

/// What the disk looks like, with all that was written to it.
fn look(
    disk: &Disk,
    stamp: impl FnOnce(&DiskFile) -> io::Result<Option<Stamp>>,
) -> Result<Option<Stamp>, SwitchError> {
    let looked = disk.file.file.sync_data().and_then(|()| stamp(&disk.file));
    looked.map_err(|source| SwitchError::Stamp { disk: disk.id.clone(), source })
}
