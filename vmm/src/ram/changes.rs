//! What changed in guest RAM since a snapshot.
//!
//! In: the snapshot that RAM was mapped from. Out: the pages that are not as it has them. Holds: where nothing is known, nothing is
//! said; a page too many is only a waste, a page too few would be another machine.

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
        "nothing is known of what changed in this VM's RAM since snapshot {parent}: it was not restored from it"
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

    /// Notes that a range shows zeroes now, whatever it was mapped from.
    pub(crate) fn note_dropped(&self, gpa: u64, len: u64) {
        let mut known = self.changes.known();
        if known.since.is_some()
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
        let mut changed = PageSet::none_of(self.page_count());
        if self.kind == Kind::Fresh {
            return Err(ChangesError::Unknown { parent: parent.generation });
        }
        let mut first = 0;
        for region in self.memory.iter() {
            self.pages.each_own_page(region.as_ptr() as u64, region.len(), |page| {
                changed.insert(first + page..first + page + 1);
            })?;
            first += region.len() / PAGE_SIZE;
        }
        if let Some(dropped) = &self.changes.known().dropped {
            changed.insert_all(dropped);
        }
        Ok(changed)
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
