//! What changed in guest RAM since a snapshot.
//!
//! In: the snapshot that RAM was mapped from; snapshots that were written since, and what was written into RAM after each. Out: the pages that
//! are not as one of them has them. Holds: where nothing is known, nothing is said; a page too many is only a waste, a page too few would be
//! another machine.
//!
//! Of the snapshot that RAM is mapped from it is always known: whatever is not the file's is the process's own. Of others it is known while
//! somebody watches all who write (`crate::dirty_log`); the time between two of them is an epoch.

use super::{GuestRam, Kind, shortened};
use crate::layout::PAGE_SIZE;
use snapshot::{GenerationId, PageSet, Parent};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Most epochs that are kept; what was written in older ones is forgotten. Each takes 32 KiB for each GiB of RAM.
const EPOCHS_MAX: usize = 8;

/// Why it is not known what changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// There is no snapshot since which it is.
    #[error(
        "nothing is known of what changed in this VM's RAM since snapshot {parent}: it was not restored from it, nor tracked since (vmm snapshot --track)"
    )]
    Unknown {
        /// The one that was asked for.
        parent: GenerationId,
    },
    /// It is known since another.
    #[error("what changed in this VM's RAM is known since snapshot {known}, not since {parent}")]
    Other {
        /// The one that was asked for.
        parent: GenerationId,
        /// The other; the last, if there are several.
        known: GenerationId,
    },
    /// The host won't say.
    #[error("cannot see which pages of guest RAM changed")]
    Look(#[from] io::Error),
}

/// What is known of changes; shared by all clones of a guest's RAM.
#[derive(Debug, Default)]
pub(super) struct Changes(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The snapshot that RAM is mapped from, with the digest of its RAM.
    origin: Option<(GenerationId, u64)>,
    /// Pages that show nothing of it any more, though nobody wrote them.
    dropped: Option<PageSet>,
    /// In order; the last one goes on.
    epochs: Vec<Since>,
    /// What was written since it was copied, if it is copied ahead.
    ahead: Option<PageSet>,
}

/// An epoch: what was written after a snapshot, and before the next.
#[derive(Debug)]
struct Since {
    snapshot: GenerationId,
    /// Of its RAM. Not known until it is written.
    digest: Option<u64>,
    written: PageSet,
}

impl Changes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn is_origin(&self, parent: &Parent) -> bool {
        self.origin == Some((parent.generation, parent.digest))
    }

    /// The epoch that began with this snapshot.
    fn epoch(&self, parent: &Parent) -> Option<usize> {
        let wanted = (parent.generation, Some(parent.digest));
        self.epochs.iter().position(|epoch| (epoch.snapshot, epoch.digest) == wanted)
    }

    /// Makes two epochs one, unless there is none before it: then nothing is known any more of that time.
    fn forget(&mut self, snapshot: GenerationId) {
        let Some(at) = self.epochs.iter().position(|epoch| epoch.snapshot == snapshot) else { return };
        let epoch = self.epochs.remove(at);
        if let Some(before) = at.checked_sub(1).and_then(|before| self.epochs.get_mut(before)) {
            before.written.insert_all(&epoch.written);
        }
    }
}

/// An epoch that has begun with a snapshot that is not whole yet. Dropped, the snapshot is none, and the epoch is part of the one before it.
#[derive(Debug)]
pub struct Epoch {
    ram: GuestRam,
    snapshot: GenerationId,
    whole: bool,
}

impl Epoch {
    /// The snapshot is whole, and its RAM has this digest.
    pub fn is_whole(mut self, digest: u64) {
        let mut known = self.ram.changes.known();
        let begun = known.epochs.iter_mut().find(|epoch| epoch.snapshot == self.snapshot);
        if let Some(epoch) = begun {
            epoch.digest = Some(digest);
        }
        drop(known);
        self.whole = true;
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        if !self.whole {
            self.ram.changes.known().forget(self.snapshot);
        }
    }
}

impl GuestRam {
    /// This RAM is as that snapshot has it.
    pub fn is_as_in(self, snapshot: GenerationId, digest: u64) -> Self {
        self.changes.known().origin = Some((snapshot, digest));
        self
    }

    /// Notes that a range shows zeroes now, whatever it was mapped from.
    pub(crate) fn note_dropped(&self, gpa: u64, len: u64) {
        let mut known = self.changes.known();
        if let Some(first) = self.page_number(gpa) {
            let dropped = known.dropped.get_or_insert_with(|| PageSet::none_of(self.page_count()));
            dropped.insert(first..first + len.div_ceil(PAGE_SIZE));
        }
    }

    /// Notes pages that were written since the last epoch began.
    pub(crate) fn note_written(&self, written: &PageSet) {
        let mut known = self.changes.known();
        let Known { epochs, ahead, .. } = &mut *known;
        let all = epochs.last_mut().map(|epoch| &mut epoch.written).into_iter().chain(ahead);
        all.for_each(|own| own.insert_all(written));
    }

    /// The pages that were noted as written since the last time; the first time, none.
    pub(crate) fn take_ahead(&self) -> PageSet {
        let none = || PageSet::none_of(self.page_count());
        self.changes.known().ahead.replace(none()).unwrap_or_else(none)
    }

    /// The same for the last time.
    pub(crate) fn end_ahead(&self) -> PageSet {
        self.changes.known().ahead.take().unwrap_or_else(|| PageSet::none_of(self.page_count()))
    }

    /// Begins an epoch with this snapshot. What was written until now must have been noted, and what will be written is.
    pub(crate) fn begin_epoch(&self, snapshot: GenerationId) -> Epoch {
        let mut known = self.changes.known();
        let written = PageSet::none_of(self.page_count());
        known.epochs.push(Since { snapshot, digest: None, written });
        if known.epochs.len() > EPOCHS_MAX {
            known.epochs.remove(0);
        }
        Epoch { ram: self.clone(), snapshot, whole: false }
    }

    /// Nobody watches who writes any more.
    pub(crate) fn end_epochs(&self) {
        self.changes.known().epochs.clear();
    }

    /// Refuses a snapshot since which nothing is known.
    ///
    /// # Errors
    /// See [`ChangesError`].
    pub fn expect_known_since(&self, parent: &Parent) -> Result<(), ChangesError> {
        let known = self.changes.known();
        if known.is_origin(parent) || known.epoch(parent).is_some() {
            return Ok(());
        }
        let parent = parent.generation;
        let last = known.epochs.iter().rfind(|epoch| epoch.digest.is_some()).map(|epoch| epoch.snapshot);
        match last.or(known.origin.map(|(origin, _)| origin)) {
            Some(known) => Err(ChangesError::Other { parent, known }),
            None => Err(ChangesError::Unknown { parent }),
        }
    }

    /// The pages that were written since that snapshot, which an epoch began with; none if no epoch did.
    pub(crate) fn written_since(&self, parent: &Parent) -> Option<PageSet> {
        let known = self.changes.known();
        let first = known.epoch(parent)?;
        let mut written = PageSet::none_of(self.page_count());
        known.epochs[first..].iter().for_each(|epoch| written.insert_all(&epoch.written));
        Some(written)
    }

    /// Refuses any other snapshot than the one that this RAM is mapped from.
    pub(crate) fn expect_origin(&self, parent: &Parent) -> Result<(), ChangesError> {
        self.expect_known_since(parent)?;
        let is_origin = !matches!(self.kind, Kind::Fresh) && self.changes.known().is_origin(parent);
        if is_origin { Ok(()) } else { Err(ChangesError::Unknown { parent: parent.generation }) }
    }

    /// The pages that changed since the snapshot that this RAM is mapped from. Nobody may write RAM meanwhile, unless it is frozen.
    ///
    /// # Errors
    /// See [`ChangesError`].
    pub fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError> {
        self.expect_origin(parent)?;
        let mut changed = self.own_pages()?;
        self.dropped().iter().for_each(|dropped| changed.insert_all(dropped));
        Ok(changed)
    }

    /// The pages that are this process's own, and no file's. Linux takes those away too that lie where a file was shortened, so that they can't be told
    /// from pages that were never written.
    pub(crate) fn own_pages(&self) -> io::Result<PageSet> {
        let (mut own, mut first) = (PageSet::none_of(self.page_count()), 0);
        for region in self.memory.iter() {
            self.pages.each_own_run(region.as_ptr() as u64, region.len(), |run| {
                own.insert(first + run.start..first + run.end);
            })?;
            first += region.len() / PAGE_SIZE;
        }
        self.lost().map_or(Ok(own), |_| Err(shortened()))
    }

    /// Pages that show nothing of the snapshot any more, though nobody wrote them.
    pub(crate) fn dropped(&self) -> Option<PageSet> {
        self.changes.known().dropped.clone()
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.memory.iter().map(|region| region.len() / PAGE_SIZE).sum()
    }

    /// In the order of guest addresses, without the holes.
    pub(crate) fn page_number(&self, gpa: u64) -> Option<u64> {
        let before = self.memory.iter().take_while(|region| region.start_addr().0 + region.len() <= gpa);
        let before: u64 = before.map(|region| region.len() / PAGE_SIZE).sum();
        let (_, start) = self.memory.to_region_addr(vm_memory::GuestAddress(gpa))?;
        Some(before + start.0 / PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discard::RamDiscard;
    use crate::ram::{FileRange, of_file};
    use devices::virtio::{Discard, Segment};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const ID: GenerationId = GenerationId([3; 16]);

    fn parent(generation: GenerationId, digest: u64) -> Parent {
        Parent { generation, digest, hint: "p".to_owned() }
    }

    fn ram() -> GuestRam {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 16 << 20], 0).unwrap();
        let ranges = [(0, 8 << 20, 0), (1 << 32, 8 << 20, 8 << 20)];
        let ranges = ranges.map(|(gpa, len, offset)| FileRange { gpa, len, offset });
        GuestRam::from_snapshot(file, &ranges).unwrap().is_as_in(ID, 5)
    }

    #[test]
    fn what_was_written_or_dropped_has_changed_and_nothing_else() {
        let ram = ram();
        let _: u8 = ram.memory().read_obj(GuestAddress(0x5000)).unwrap();
        assert!(ram.changed_since(&parent(ID, 5)).unwrap().is_empty());
        ram.memory().write_obj(1u8, GuestAddress(0x3000)).unwrap();
        ram.memory().write_obj(7u8, GuestAddress((1 << 32) + 0x1000)).unwrap();
        RamDiscard::new(&ram).discard(Segment { address: (1 << 32) + (2 << 20), len: 2 << 20 });
        RamDiscard::new(&ram).discard(Segment { address: 0x3000, len: 4096 });
        let changed = ram.changed_since(&parent(ID, 5)).unwrap();
        let runs: Vec<_> = changed.runs(0..4096).collect();
        assert_eq!(runs, [2049..2050, 2048 + 512..2048 + 1024]);
    }

    /// What was written there is gone with it, and the page looks as if it had never been written.
    #[test]
    fn nothing_is_said_where_the_snapshot_was_shortened() {
        let (file, ram) = of_file(7, 4 << 20);
        let ram = ram.watched(std::path::Path::new("shortened")).is_as_in(ID, 5);
        ram.memory().write_obj(1u8, GuestAddress(3 << 20)).unwrap();
        assert_eq!(ram.changed_since(&parent(ID, 5)).unwrap().len(), 1);
        file.set_len(2 << 20).unwrap();
        assert!(ram.changed_since(&parent(ID, 5)).unwrap_err().to_string().starts_with("cannot see"));
    }

    fn pages(numbers: &[u64]) -> PageSet {
        let mut set = PageSet::none_of(4096);
        numbers.iter().for_each(|page| set.insert(*page..page + 1));
        set
    }

    #[test]
    fn each_epoch_has_what_was_written_in_it_and_later() {
        let ram = ram();
        let [first, second] = [1, 2].map(|id| GenerationId([id; 16]));
        assert!(ram.written_since(&parent(first, 1)).is_none());
        let begun = ram.begin_epoch(first);
        assert!(ram.expect_known_since(&parent(first, 1)).is_err(), "it is not whole yet");
        begun.is_whole(1);
        ram.note_written(&pages(&[3, 4]));
        ram.begin_epoch(second).is_whole(2);
        ram.note_written(&pages(&[9]));
        assert_eq!(ram.written_since(&parent(first, 1)), Some(pages(&[3, 4, 9])));
        assert_eq!(ram.written_since(&parent(second, 2)), Some(pages(&[9])));
        assert!(matches!(ram.expect_known_since(&parent(second, 1)), Err(ChangesError::Other { .. })));
        ram.expect_known_since(&parent(ID, 5)).unwrap();
        ram.end_epochs();
        assert!(ram.expect_known_since(&parent(first, 1)).is_err());
    }

    #[test]
    fn a_snapshot_that_fails_loses_nothing_of_what_was_written_after_it() {
        let ram = ram();
        let [first, second, third] = [1, 2, 3].map(|id| GenerationId([id; 16]));
        drop(ram.begin_epoch(third));
        ram.begin_epoch(first).is_whole(1);
        let failing = ram.begin_epoch(second);
        ram.note_written(&pages(&[7]));
        ram.begin_epoch(third).is_whole(3);
        ram.note_written(&pages(&[8]));
        drop(failing);
        assert_eq!(ram.written_since(&parent(first, 1)), Some(pages(&[7, 8])));
        assert_eq!(ram.written_since(&parent(third, 3)), Some(pages(&[8])));
        for id in 10..10 + EPOCHS_MAX as u8 {
            ram.begin_epoch(GenerationId([id; 16])).is_whole(u64::from(id));
        }
        assert!(ram.written_since(&parent(first, 1)).is_none(), "it is too old");
    }

    #[test]
    fn nothing_is_said_of_another_snapshot() {
        let ram = ram();
        assert!(matches!(ram.changed_since(&parent(ID, 6)), Err(ChangesError::Other { .. })));
        let other = GenerationId([4; 16]);
        assert!(matches!(ram.changed_since(&parent(other, 5)), Err(ChangesError::Other { .. })));
        let fresh = GuestRam::new(8 << 20).unwrap();
        assert!(matches!(fresh.changed_since(&parent(ID, 5)), Err(ChangesError::Unknown { .. })));
    }
}
