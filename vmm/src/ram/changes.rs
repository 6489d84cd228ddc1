//! What changed in guest RAM since a snapshot.
//!
//! In: the snapshot that RAM was mapped from, or one with which tracking began. Out: the pages that are not as it has them. Holds: where nothing is known, nothing is
//! said; a page too many is only a waste, a page too few would be another machine.

use super::track::Tracker;
use super::{GuestRam, Kind};
use crate::layout::PAGE_SIZE;
use snapshot::{GenerationId, PageSet, Parent};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Why it is not known what changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// There is no snapshot since which it is.
    #[error(
        "nothing is known of what changed in this VM's RAM since snapshot {parent}: it was not restored from it, nor was that taken with --track"
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
        /// The other.
        known: GenerationId,
    },
    /// The host can't mark pages.
    #[error(
        "this host can't track what a guest changes (userfaultfd, with asynchronous write protection: Linux 6.7)"
    )]
    NoTracking(#[source] io::Error),
    /// The host won't say.
    #[error("cannot see which pages of guest RAM changed")]
    Look(#[from] io::Error),
}

/// What is known of changes; shared by all clones of a guest's RAM.
#[derive(Debug, Default)]
pub(super) struct Changes(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The snapshot since which they are, with the digest of its RAM.
    since: Option<(GenerationId, u64)>,
    /// Pages that show nothing of it any more, though nobody wrote them.
    dropped: Option<PageSet>,
    /// Marks what has not changed, since tracking began. Without it what was written is what is not the file's.
    tracker: Option<Tracker>,
}

impl Changes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestRam {
    /// This RAM is as that snapshot has it.
    pub fn is_as_in(self, snapshot: GenerationId, digest: u64) -> Self {
        self.changes.known().since = Some((snapshot, digest));
        self
    }

    /// Notes that a range shows zeroes now, whatever it was mapped from; or, if not `zero`, what it was mapped from again, which is no change if
    /// changes are known since that.
    pub(crate) fn note_dropped(&self, gpa: u64, len: u64, zero: bool) {
        let mut known = self.changes.known();
        if (known.tracker.is_some() || zero && known.since.is_some())
            && let Some(first) = self.page_number(gpa)
        {
            let dropped = known.dropped.get_or_insert_with(|| PageSet::none_of(self.page_count()));
            dropped.insert(first..first + len.div_ceil(PAGE_SIZE));
        }
    }

    /// Refuses a snapshot since which nothing is known.
    ///
    /// # Errors
    /// See [`ChangesError`].
    pub fn expect_known_since(&self, parent: &Parent) -> Result<(), ChangesError> {
        match self.changes.known().since {
            Some(since) if since == (parent.generation, parent.digest) => Ok(()),
            Some((known, _)) => Err(ChangesError::Other { parent: parent.generation, known }),
            None => Err(ChangesError::Unknown { parent: parent.generation }),
        }
    }

    /// The pages that changed since that snapshot. Nobody may write RAM meanwhile, unless it is frozen.
    ///
    /// # Errors
    /// See [`ChangesError`].
    pub fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError> {
        self.expect_known_since(parent)?;
        let tracked = self.is_tracked();
        let unfit = if tracked { Kind::Frozen } else { Kind::Fresh };
        if self.kind == unfit {
            return Err(ChangesError::Unknown { parent: parent.generation });
        }
        let mut changed = PageSet::none_of(self.page_count());
        let mut first = 0;
        for region in self.memory.iter() {
            let (host, len) = (region.as_ptr() as u64, region.len());
            let note = |page| changed.insert(first + page..first + page + 1);
            match tracked {
                true => self.pages.each_unmarked_page(host, len, note)?,
                false => self.pages.each_own_page(host, len, note)?,
            }
            first += len / PAGE_SIZE;
        }
        if let Some(dropped) = &self.changes.known().dropped {
            changed.insert_all(dropped);
        }
        Ok(changed)
    }

    /// Whether changes are known because they are tracked; a child does not have the marks.
    pub fn is_tracked(&self) -> bool {
        self.changes.known().tracker.is_some()
    }

    /// Has what changes from now on tracked. Nobody may write RAM meanwhile. What changed until now is known no more.
    ///
    /// # Errors
    /// The host can't.
    pub fn track(&self) -> Result<(), ChangesError> {
        let mut known = self.changes.known();
        let tracker = known.tracker.take().map_or_else(Tracker::new, Ok).map_err(ChangesError::NoTracking)?;
        *known = Known::default();
        for region in self.memory.iter() {
            tracker.mark(region.as_ptr() as u64, region.len()).map_err(ChangesError::NoTracking)?;
        }
        known.tracker = Some(tracker);
        Ok(())
    }

    /// When tracking began RAM was as that snapshot has it.
    pub fn began_as(&self, snapshot: GenerationId, digest: u64) {
        let mut known = self.changes.known();
        if known.tracker.is_some() {
            known.since = Some((snapshot, digest));
        }
    }

    fn page_count(&self) -> u64 {
        self.memory.iter().map(|region| region.len() / PAGE_SIZE).sum()
    }

    /// In the order of guest addresses, without the holes.
    fn page_number(&self, gpa: u64) -> Option<u64> {
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
    use crate::ram::FileRange;
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

    /// Written, dropped in small and in large; what was only read, or never touched, has not changed.
    #[test]
    fn tracked_ram_tells_what_changed_whatever_it_is() {
        for ram in [GuestRam::new(16 << 20).unwrap(), ram()] {
            ram.memory().write_slice(&[1; 4 << 20], GuestAddress(0)).unwrap();
            let tracking = ram.track();
            if let Err(ChangesError::NoTracking(error)) = &tracking {
                eprintln!("SKIPPED: this host can't track changes (Linux 6.7 can): {error}");
                return;
            }
            tracking.unwrap();
            ram.began_as(ID, 9);
            assert!(ram.changed_since(&parent(ID, 9)).unwrap().is_empty());
            let _: u8 = ram.memory().read_obj(GuestAddress(0x5000)).unwrap();
            ram.memory().write_obj(1u8, GuestAddress(0x3000)).unwrap();
            ram.writer().write(7 << 20, &[1]).unwrap();
            RamDiscard::new(&ram).discard(Segment { address: 0x8000, len: 4096 });
            RamDiscard::new(&ram).discard(Segment { address: 2 << 20, len: 2 << 20 });
            let changed = ram.changed_since(&parent(ID, 9)).unwrap();
            let runs: Vec<_> = changed.runs(0..4096).collect();
            assert_eq!(runs, [3..4, 8..9, 512..1024, 1792..1793]);
            // Again, with what was put in place of what was dropped.
            ram.track().unwrap();
            assert!(ram.changed_since(&parent(ID, 9)).is_err());
            ram.began_as(ID, 10);
            ram.memory().write_obj(1u8, GuestAddress(2 << 20)).unwrap();
            let changed = ram.changed_since(&parent(ID, 10)).unwrap();
            assert_eq!(changed.runs(0..4096).next(), Some(512..513));
            assert_eq!(changed.len(), 1);
        }
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
