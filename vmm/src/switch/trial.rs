//! Kernels on trial: what they write to disks lies beside these, until it is accepted.
//!
//! In: a kernel that is about to run; the word that it may stay. Out: a kernel whose writes can still be dropped; disks that have them.
//! Holds: a disk is untouched until there is room on all of them for all that was written.

use super::sleeper::{Ready, Sleeper};
use super::{Kernels, SwitchError};
use crate::disk::{Held, Trial};
use std::sync::Arc;

/// Has the kernel write beside its disks.
pub(super) fn put_on_trial(ready: &mut Ready) -> Result<(), SwitchError> {
    if !ready.is_new {
        return Err(SwitchError::NotNew(ready.name.clone()));
    }
    for disk in ready.disks.iter_mut().filter(|disk| !disk.file.read_only) {
        let trial = Trial::of(&disk.file);
        let trial = trial.map_err(|source| SwitchError::NoTrial { disk: disk.id.clone(), source })?;
        disk.file.trial = Some(Arc::new(trial));
    }
    ready.on_trial = true;
    Ok(())
}

impl Kernels {
    /// Whether the one that is awake is on trial.
    pub fn is_on_trial(&self) -> bool {
        self.awake.as_ref().is_some_and(|awake| awake.on_trial)
    }

    /// Refuses what needs a kernel that is sure to have run.
    pub(super) fn expect_no_trial(&self) -> Result<(), SwitchError> {
        match &self.awake {
            Some(awake) if awake.on_trial => Err(SwitchError::OnTrial(awake.name.clone())),
            _ => Ok(()),
        }
    }

    /// Writes to the disks what was written on trial, and has it go on with them. It runs meanwhile, but for its disks. Returns
    /// how many bytes were written.
    ///
    /// # Errors
    /// It is not on trial; or a disk has no room for all of it, and then none was touched; or one can't be written.
    pub fn accept(&mut self) -> Result<u64, SwitchError> {
        let name = self.origin().0.to_owned();
        if !self.is_on_trial() {
            return Err(SwitchError::NotOnTrial(name));
        }
        let trials: Vec<_> = self
            .awake()
            .disks
            .iter()
            .filter_map(|disk| Some((disk.id.clone(), disk.file.trial.clone()?)))
            .collect();
        let held: Vec<_> = trials.iter().map(|(disk, trial)| (disk, trial.hold())).collect();
        self.reserve(&held)?;
        let mut bytes = 0;
        for (disk, held) in &held {
            let half =
                |source| SwitchError::HalfAccepted { disk: (*disk).clone(), name: name.clone(), source };
            bytes += held.apply().map_err(half)?;
        }
        held.into_iter().for_each(|(_, held)| held.finish());
        if let Some(awake) = &mut self.awake {
            awake.on_trial = false;
            awake.machine.disks.iter_mut().for_each(|disk| disk.file.trial = None);
        }
        Ok(bytes)
    }

    /// Room is kept on every disk before one is written. If there is none, who sleeps finds disks that look as they looked: some file systems
    /// give a file another time for room that is kept.
    fn reserve(&mut self, held: &[(&String, Held<'_>)]) -> Result<(), SwitchError> {
        let up_to_date: Vec<_> = self.asleep.iter().map(|sleeper| sleeper.check_disks().is_ok()).collect();
        for (disk, held) in held {
            if let Err(source) = held.reserve() {
                let slept = self.asleep.iter_mut().zip(up_to_date);
                let unaware = slept.filter_map(|(sleeper, is)| is.then_some(sleeper));
                unaware.filter(|sleeper| !sleeper.stamps.is_empty()).try_for_each(Sleeper::stamp)?;
                return Err(SwitchError::NoRoom { disk: (*disk).clone(), source });
            }
        }
        Ok(())
    }
}
