//! Who is to run next, up to where the host's ends are needed.
//!
//! In: a kernel to boot, one in a file, or the name of one that sleeps. Out: its state, RAM and disks. Holds: the awake kernel still runs,
//! and goes on as if nothing had been asked if this fails.

use super::sleeper::{Ready, Sleeper};
use super::{Kept, Kernels, Newcomer, Next, SwitchError, adopt, image};
use crate::capture::MachineState;
use crate::clock::TimePolicy;
use crate::config::{Shape, parse_name};
use crate::kernel;
use crate::load;
use crate::start;
use crate::virtio::SlotState;

impl Kernels {
    /// All that can be refused while the awake kernel still runs.
    pub(super) fn prepare(&self, next: &Next) -> Result<Ready, SwitchError> {
        match next {
            Next::Boot(newcomer) => self.prepare_boot(newcomer),
            Next::Wake(name, time) => self.prepare_sleeper(&self.asleep[self.find(name)?], *time),
            Next::Snapshot(kept) => self.prepare_kept(kept),
        }
    }

    fn prepare_boot(&self, newcomer: &Newcomer) -> Result<Ready, SwitchError> {
        let machine = self.awake();
        let disks: Vec<_> = machine
            .disks
            .iter()
            .filter(|disk| newcomer.share_disks || disk.file.read_only)
            .cloned()
            .collect();
        let has_disk = |slot: &SlotState| !slot.is_disk() || disks.iter().any(|disk| disk.id == slot.id);
        let devices: Vec<_> = machine.board().virtio().save();
        let image = newcomer.image.as_ref().is_some_and(|wish| wish.write_to.is_some());
        let devices = devices.iter().map(SlotState::after_reset).filter(has_disk);
        let devices = image.then(image::disk_slot).into_iter().chain(devices).collect();
        let shape = Shape {
            name: machine.shape().name.clone(),
            vcpus: newcomer.vcpus.unwrap_or(machine.shape().vcpus),
            memory: newcomer.memory.unwrap_or(machine.shape().memory),
            kernel: Default::default(),
        };
        let announced = newcomer
            .image
            .as_ref()
            .map(|_| image::announce(&newcomer.source, shape.memory, machine.shape().memory));
        let source = announced.as_ref().unwrap_or(&newcomer.source);
        let (state, ram) = start::prepare(&self.kvm, shape, devices, source)?;
        let name = self.name_for(newcomer.name.as_deref(), &state)?;
        let source = newcomer.source.kernel.clone();
        Ok(Ready {
            name,
            source,
            state,
            ram,
            time: TimePolicy::Freeze,
            disks,
            generation: None,
            on_trial: false,
            is_new: true,
        })
    }

    fn prepare_sleeper(&self, sleeper: &Sleeper, time: TimePolicy) -> Result<Ready, SwitchError> {
        let mut ready = sleeper.ready(time)?;
        if sleeper.stranger {
            // Those of its disks that it shares are stood in for, so it has seen nothing of them.
            let adopted = adopt::adopt(&mut ready.state, &[], self.awake(), true);
            let name = || sleeper.name.clone();
            ready.disks = adopted.map_err(|source| SwitchError::Adopt { name: name(), source })?;
        }
        Ok(ready)
    }

    /// Other machines may go on from the same snapshot, so the guest is given a generation id of its own.
    fn prepare_kept(&self, kept: &Kept) -> Result<Ready, SwitchError> {
        let chain = load::open_chain(&kept.file)?;
        let snapshot = chain.top();
        let mut state = load::state(snapshot)?;
        load::check_host(&self.kvm, snapshot, &state)?;
        let name = self.name_for(kept.name.as_deref(), &state)?;
        let adopted = adopt::adopt(&mut state, &load::disks(snapshot)?, self.awake(), kept.share_disks);
        let disks = adopted.map_err(|source| SwitchError::Adopt { name: name.clone(), source })?;
        let (source, ram, generation) =
            (kept.file.clone(), load::ram_of(&chain)?, Some(start::generation()?));
        Ok(Ready {
            name,
            source,
            state,
            ram,
            time: kept.time,
            disks,
            generation,
            on_trial: false,
            is_new: true,
        })
    }

    fn name_for(&self, wish: Option<&str>, state: &MachineState) -> Result<String, SwitchError> {
        let taken = |name: &str| self.is_known(name);
        if let Some(name) = wish {
            let good = parse_name(name).is_ok() && !taken(name);
            return if good { Ok(name.to_owned()) } else { Err(SwitchError::BadName(name.to_owned())) };
        }
        let release = state.shape.kernel.version.as_deref().map_or("kernel", kernel::release);
        let base = release.chars().take(48).collect::<String>();
        let numbered = (2..).map(|number| format!("{base}-{number}"));
        let free = std::iter::once(base.clone()).chain(numbered).find(|name| !taken(name));
        Ok(free.unwrap_or(base))
    }
}
