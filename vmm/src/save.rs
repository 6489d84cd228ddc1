//! Save: a paused machine becomes a snapshot file.
//!
//! In: a [`PausedMachine`], a path. Out: the file, whole under its name or not there at all. Holds: what a host must
//! offer is read off the state itself; a person reads it in the manifest, and a restore holds the state against the host.

mod notes;
mod reading;

use crate::capture::MachineState;
use crate::copy_ahead::{AheadError, Borrowed, CopiedAhead};
use crate::disk::{self, Disk, DiskCare, DiskRecord, DisksError, Unclaimed};
use crate::frozen::{FreezeError, FrozenRam};
use crate::kvm::Ioctl;
use crate::machine::PausedMachine;
use crate::ram::{ChangesError, Epoch, GuestRam};
use crate::vmcoreinfo::Place;
use notes::{Notes, debugger_registers};
use reading::{ReadRam, Reading, SavedRam};
use snapshot::chain::CHAIN_MAX;
use snapshot::{
    About, Chain, ChainError, Contents, Delta, Elfcorehdr, GenerationId, PageSet, Parent, SealKey, Section,
    SectionError, SectionRef, Snapshot, Summary, UnverifiedSnapshot, WriteError,
};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Version of the encoding of every section.
pub const SECTION_VERSION: u32 = 2;
/// Name of the section with the machine's [`crate::config::Shape`].
pub const SHAPE: &str = "shape";
/// Name of the section with what KVM holds for the VM.
pub const VM: &str = "vm";
/// Name of the section with the devices.
pub const BOARD: &str = "board";
/// Name of the section with the disks' records.
pub const DISKS: &str = "disks";
/// Name of the section with the host's voucher, if it gives one.
pub const VOUCHER: &str = "voucher";
/// The CPU vendor that a host must have.
pub const NEED_VENDOR: &str = "cpu vendor";
/// Bytes of XSAVE state that a host must be able to hold.
pub const NEED_XSAVE: &str = "xsave bytes";
/// The TSC's frequency in kHz, which a host must have or be able to scale to.
pub const NEED_TSC: &str = "tsc kHz";

/// Name of the section with a vCPU's state.
pub fn vcpu_section(index: usize) -> String {
    format!("vcpu{index}")
}

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its state could not be read.
    #[error(transparent)]
    Capture(#[from] Ioctl),
    /// A disk could not be made to stand by the snapshot.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// A part of it has no encoding.
    #[error(transparent)]
    Encode(#[from] SectionError),
    /// RAM could not be searched for what the guest's kernel says about itself.
    #[error("cannot read guest RAM")]
    ReadRam(#[source] io::Error),
    /// The host has no random bytes for the snapshot's identity.
    #[error("cannot get random bytes for the snapshot's generation id")]
    Random(#[source] io::Error),
    /// Its RAM can't be kept as it is while it runs on.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// It can't be a difference to that snapshot.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// Its parents.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It would take the place of one that it needs.
    #[error("{} is snapshot {needed}, which the new one would need: choose another name", path.display())]
    Needed {
        /// The file.
        path: PathBuf,
        /// What it is.
        needed: GenerationId,
    },
    /// The file.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl PausedMachine<'_> {
    /// Writes the machine to `path`, replacing a snapshot of that name only once the new one is whole. `progress` hears
    /// how many bytes of RAM are done, and how many there are.
    ///
    /// Order: the disks are synced after the capture has let them finish what was under way, and recorded after that, so that
    /// disks and RAM are of one instant. Kept disks have their names before the snapshot that names them has its own.
    ///
    /// # Errors
    /// See [`SaveError`]; the machine is as before.
    pub fn save(&self, wish: Wish, progress: &mut dyn FnMut(u64, u64)) -> Result<Summary, SaveError> {
        let taken = Taken::of(self, wish)?;
        taken.write(self.ram(), progress)
    }

    /// The same for somebody who wants to look at the machine, and to whom its disks are nothing: they are not synced, so that one
    /// that hangs holds nobody up, and one that can't be recorded is left out.
    ///
    /// # Errors
    /// See [`SaveError`]; the machine is as before.
    pub fn dump(&self, path: &Path) -> Result<Summary, SaveError> {
        let disks = &self.machine().disks;
        let record = |generation: &_| {
            Ok(disk::record(disks, DiskCare::default(), path, generation).unwrap_or_default())
        };
        Taken::with_disks(self, path, false, record)?.write(self.ram(), &mut |_, _| {})
    }

    /// The same of a machine that has only stand-ins for the disks that it may write: of disks that it can't write only a record is kept.
    ///
    /// # Errors
    /// See [`SaveError`]; the machine is as before.
    pub fn save_apart(&self, path: &Path) -> Result<Summary, SaveError> {
        let disks: Vec<_> = self.machine().disks.iter().filter(|disk| disk.file.read_only).cloned().collect();
        let record = |generation: &_| disk::record(&disks, DiskCare::default(), path, generation);
        Taken::with_disks(self, path, false, record)?.write(self.ram(), &mut |_, _| {})
    }

    /// Takes what [`PausedMachine::save`] writes, for [`Frozen::write`], so that the machine can run on meanwhile. With its RAM copied ahead it
    /// stands still for a shorter time.
    ///
    /// # Errors
    /// See [`SaveError`]; the machine is as before.
    pub fn freeze(&self, wish: Wish, ahead: Option<CopiedAhead>) -> Result<Frozen, SaveError> {
        let taken = Taken::of(self, wish)?;
        let whole = || FrozenRam::of(self.ram());
        // What goes wrong with it only makes this take longer.
        let (ram, log, not_ahead) = match ahead.map(CopiedAhead::finish) {
            Some(Ok((ram, log))) => (ram, Some(log), None),
            Some(Err(error)) => (whole()?, None, Some(error)),
            None => (whole()?, None, None),
        };
        Ok(Frozen { taken, ram, running: self.ram().clone(), log, not_ahead })
    }
}

/// What is to be saved of a machine, and where.
#[derive(Clone, Debug)]
pub struct Wish {
    path: PathBuf,
    care: DiskCare,
    parent: Option<Parent>,
    key: Option<SealKey>,
}

impl Wish {
    /// All of it, to `path`.
    pub fn new(path: &Path, care: DiskCare) -> Self {
        Self { path: path.to_owned(), care, parent: None, key: None }
    }

    /// With a seal by this key, if there is one.
    pub fn sealed_with(self, key: Option<SealKey>) -> Self {
        Self { key, ..self }
    }

    /// Only what changed since the last of this chain.
    ///
    /// # Errors
    /// The file is one that it would need, or the chain is as long as may be.
    pub fn since(self, chain: &Chain) -> Result<Self, SaveError> {
        let path = || chain.top().path().to_owned();
        if chain.links().len() >= CHAIN_MAX {
            return Err(SaveError::Chain(ChainError::TooLong(path())));
        }
        let is_target = |link: &&Snapshot| disk::is_same_file(link.path(), &self.path);
        if let Some(link) = chain.links().iter().find(is_target) {
            return Err(SaveError::Needed { path: self.path, needed: link.manifest().about.generation });
        }
        let parent = Parent::of(chain.top(), &self.path);
        Ok(Self { parent: Some(parent), ..self })
    }
}

/// All of a machine at one instant but its RAM, on its way to a file. Dropped, it leaves nothing there.
struct Taken {
    notes: Notes,
    records: Vec<DiskRecord>,
    kept: Unclaimed,
    memory: u64,
    path: PathBuf,
    /// The snapshot that it is a difference to, with what was written since, if it was watched who writes.
    since: Option<(Option<PageSet>, Parent)>,
    key: Option<SealKey>,
    /// Begins with it, if it is watched who writes from now on.
    epoch: Option<Epoch>,
}

impl Taken {
    fn of(paused: &PausedMachine, wish: Wish) -> Result<Self, SaveError> {
        let Wish { path, care, parent, key } = wish;
        parent.as_ref().map_or(Ok(()), |parent| paused.ram().expect_known_since(parent))?;
        let disks = &paused.machine().disks;
        let mut taken = Self::with_disks(paused, &path, care.at_once, |generation| {
            disk::sync(disks)?;
            disk::record(disks, care, &path, generation)
        })?;
        // The devices are done with what they had under way, so that nobody writes RAM any more.
        let tracked = paused.machine().note_written()?;
        let written = |parent: Parent| (paused.ram().written_since(&parent), parent);
        (taken.since, taken.key) = (parent.map(written), key);
        taken.epoch = tracked.then(|| paused.ram().begin_epoch(taken.notes.about.generation));
        Ok(taken)
    }

    /// The disks are recorded after the capture has let them finish what was under way.
    fn with_disks(
        paused: &PausedMachine,
        path: &Path,
        at_once: bool,
        record: impl FnOnce(&GenerationId) -> Result<(Vec<DiskRecord>, Unclaimed), DisksError>,
    ) -> Result<Self, SaveError> {
        let state = paused.capture()?;
        let generation = GenerationId::random().map_err(SaveError::Random)?;
        let (records, kept) = record(&generation)?;
        let machine = paused.machine();
        let vmcoreinfo = if at_once { machine.vmcoreinfo_at_once() } else { machine.vmcoreinfo() };
        let vmcoreinfo = vmcoreinfo.map_err(SaveError::ReadRam)?;
        let notes = Notes::new(&state, &records, generation, vmcoreinfo)?;
        let (memory, path) = (state.shape.memory, path.to_owned());
        Ok(Self { notes, records, kept, memory, path, since: None, key: None, epoch: None })
    }

    fn write(self, ram: &dyn ReadRam, progress: &mut dyn FnMut(u64, u64)) -> Result<Summary, SaveError> {
        let delta = self.since.map(|(written, parent)| {
            let changed = written.map_or_else(|| ram.changed_since(&parent), Ok)?;
            Ok::<_, SaveError>(Delta { parent, changed })
        });
        let delta = delta.transpose()?;
        let ram = SavedRam::new(ram, self.memory);
        let contents = Contents { delta: delta.as_ref(), ..self.notes.contents(&ram) };
        let replaced = records_at(&self.path).unwrap_or_default();
        let written = snapshot::write_sealed(&self.path, &contents, self.key.as_ref(), progress);
        if written.as_ref().map_or_else(WriteError::is_in_place, |_| true) {
            self.kept.claim();
        }
        let summary = written?;
        if let Some(epoch) = self.epoch {
            epoch.is_whole(summary.ram_digest);
        }
        disk::remove_kept(&replaced, &self.records, &self.path);
        Ok(summary)
    }
}

/// A machine as of one instant, on its way to a file. Dropped, it leaves nothing there.
pub struct Frozen {
    taken: Taken,
    ram: FrozenRam,
    running: GuestRam,
    /// By which RAM was copied ahead.
    log: Option<Borrowed>,
    not_ahead: Option<AheadError>,
}

impl Frozen {
    /// The RAM of the machine that runs on.
    pub(crate) fn running_ram(&self) -> GuestRam {
        self.running.clone()
    }

    /// Why what was copied ahead of its RAM was of no use, if so.
    pub fn not_ahead(&self) -> Option<&AheadError> {
        self.not_ahead.as_ref()
    }

    /// Writes it, unless `cancelled` is set meanwhile; `progress` as in [`PausedMachine::save`].
    ///
    /// # Errors
    /// See [`SaveError`].
    pub fn write(
        self,
        cancelled: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Summary, SaveError> {
        drop(self.log);
        self.ram.yield_first();
        self.taken.write(&Reading { ram: &self.ram, cancelled }, progress)
    }
}

/// A machine that stands still, as another kernel is shown it: headers and notes for `at` in that kernel's memory, RAM at `window`.
/// The disks are synced and recorded, as in a snapshot.
///
/// # Errors
/// As [`PausedMachine::save`].
pub(crate) fn elfcorehdr(
    state: &MachineState,
    ram: &GuestRam,
    disks: &[Disk],
    at: u64,
    window: u64,
) -> Result<Elfcorehdr, SaveError> {
    let generation = GenerationId::random().map_err(SaveError::Random)?;
    disk::sync(disks)?;
    // No disk is kept, so there is no file for it to lie beside.
    let (records, _) = disk::record(disks, DiskCare::default(), Path::new(""), &generation)?;
    let vmcoreinfo = Place::default().look(ram, &state.shape).map_err(SaveError::ReadRam)?;
    let notes = Notes::new(state, &records, generation, vmcoreinfo)?;
    Ok(Elfcorehdr::new(&notes.contents(&SavedRam::new(ram, state.shape.memory)), at, window)?)
}

/// The machine that a snapshot has, with an id of its own and all of its RAM, sealed if there is a key.
///
/// # Errors
/// As [`PausedMachine::save`].
pub(crate) fn rewrite(
    of: &Snapshot,
    state: &MachineState,
    ram: &GuestRam,
    (path, key): (&Path, Option<&SealKey>),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, SaveError> {
    let generation = GenerationId::random().map_err(SaveError::Random)?;
    let own = |section: &SectionRef| section.name != snapshot::delta::DELTA;
    let copy = |section: SectionRef| Section {
        name: section.name.to_owned(),
        version: section.version,
        bytes: section.bytes.to_vec(),
    };
    let notes = Notes {
        about: About { generation, ..of.manifest().about.clone() },
        vcpus: state.vcpus.iter().map(debugger_registers).collect(),
        vmcoreinfo: of.vmcoreinfo().map(<[u8]>::to_vec),
        sections: of.sections().filter(own).map(copy).collect(),
    };
    let ram = SavedRam::new(ram, state.shape.memory);
    Ok(snapshot::write_sealed(path, &notes.contents(&ram), key, progress)?)
}
/// The disks of a snapshot that is to be replaced; none of what is no snapshot.
fn records_at(path: &Path) -> Option<Vec<DiskRecord>> {
    let snapshot = UnverifiedSnapshot::open(path).ok()?.verify_link().ok()?;
    let records: Vec<DiskRecord> = snapshot.section(DISKS)?.decode(SECTION_VERSION).ok()?;
    disk::check(&records).ok().map(|()| records)
}
