//! Packed pages: those of a set, one behind the other in the order of guest addresses.
//!
//! In: a set of pages, RAM. Out: RAM that has nothing else, at addresses of its own, which are counted from 0; where its pages are in the guest.
//! Holds: which page lies at a place is found without counting those before it.

use crate::{ChunkContent, PAGE_SIZE, PageSet, RamRange, RamSource};
use std::io;

/// Pages of RAM between two that are counted up to.
const BLOCK: u64 = 4096;

/// Where packed pages are in the guest.
pub(crate) struct Packed<'a> {
    set: &'a PageSet,
    /// The guest's RAM.
    ranges: &'a [RamRange],
    /// Bytes of packed pages before each block of RAM.
    before: Vec<u64>,
    /// Bytes of them all.
    pub(crate) len: u64,
}

impl<'a> Packed<'a> {
    /// The pages of a set, which is of RAM with these ranges.
    pub(crate) fn new(set: &'a PageSet, ranges: &'a [RamRange]) -> Self {
        let (mut before, mut len) = (Vec::new(), 0);
        for block in (0..crate::delta::pages(ranges)).step_by(BLOCK as usize) {
            before.push(len);
            len += set.count(block..block + BLOCK) * PAGE_SIZE;
        }
        Self { set, ranges, before, len }
    }

    /// Where in the guest these packed bytes are, whole pages.
    pub(crate) fn runs(&self, at: u64, len: u64) -> impl Iterator<Item = RamRange> {
        let block = self.before.partition_point(|before| *before <= at).saturating_sub(1);
        let mut skipped = at - self.before.get(block).unwrap_or(&0);
        let mut left = len;
        let wanted = self.from(block as u64 * BLOCK).map(move |run| {
            let skip = skipped.min(run.len);
            let len = left.min(run.len - skip);
            (skipped, left) = (skipped - skip, left - len);
            RamRange { gpa: run.gpa + skip, len }
        });
        wanted.skip_while(|run| run.len == 0).take_while(|run| run.len > 0)
    }

    /// Where in the guest the page at this packed address is.
    pub(crate) fn gpa(&self, at: u64) -> u64 {
        self.runs(at, PAGE_SIZE).next().map_or(0, |run| run.gpa)
    }

    /// All runs from a page on; none reaches across two ranges.
    fn from(&self, page: u64) -> impl Iterator<Item = RamRange> {
        let mut end = 0;
        self.ranges.iter().flat_map(move |range| {
            let first = end;
            end += range.len / PAGE_SIZE;
            let place = move |page| range.gpa + (page - first) * PAGE_SIZE;
            let runs = self.set.runs(page.max(first)..end);
            runs.map(move |run| RamRange { gpa: place(run.start), len: (run.end - run.start) * PAGE_SIZE })
        })
    }
}

/// The changed pages of RAM, to be written like any RAM.
pub(crate) struct PackedRam<'a> {
    source: &'a dyn RamSource,
    pub(crate) packed: Packed<'a>,
    /// Empty if there are none.
    ranges: [RamRange; 1],
}

impl<'a> PackedRam<'a> {
    /// Those of a source that are in the set.
    pub(crate) fn new(source: &'a dyn RamSource, changed: &'a PageSet) -> Self {
        let packed = Packed::new(changed, source.ranges());
        let ranges = [RamRange { gpa: 0, len: packed.len }];
        Self { source, packed, ranges }
    }
}

impl RamSource for PackedRam<'_> {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn read_chunk(&self, at: u64, buf: &mut [u8]) -> io::Result<ChunkContent> {
        let (runs, mut rest) = (self.packed.runs(at, buf.len() as u64), buf);
        for RamRange { gpa, len } in runs {
            let (part, after) = rest.split_at_mut(len as usize);
            self.source.read_pages(gpa, part)?;
            rest = after;
        }
        Ok(ChunkContent::Data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta;
    use proptest::prelude::*;

    const RANGES: [RamRange; 2] =
        [RamRange { gpa: 0, len: 5000 * PAGE_SIZE }, RamRange { gpa: 1 << 32, len: 9000 * PAGE_SIZE }];

    fn pages(runs: impl Iterator<Item = RamRange>) -> Vec<u64> {
        let each = |run: RamRange| (run.gpa..run.gpa + run.len).step_by(PAGE_SIZE as usize);
        runs.flat_map(each).map(|gpa| delta::page_number(&RANGES, gpa).unwrap()).collect()
    }

    #[test]
    fn runs_end_with_their_range_and_with_what_is_wanted() {
        let mut set = PageSet::none_of(14000);
        set.insert(4998..5003);
        let packed = Packed::new(&set, &RANGES);
        assert_eq!(packed.len, 5 * PAGE_SIZE);
        let expected = [
            RamRange { gpa: 4999 * PAGE_SIZE, len: PAGE_SIZE },
            RamRange { gpa: 1 << 32, len: 2 * PAGE_SIZE },
        ];
        assert_eq!(packed.runs(PAGE_SIZE, 3 * PAGE_SIZE).collect::<Vec<_>>(), expected);
        assert_eq!(packed.gpa(4 * PAGE_SIZE), (1 << 32) + 2 * PAGE_SIZE);
        assert_eq!(packed.runs(5 * PAGE_SIZE, PAGE_SIZE).next(), None);
    }

    #[test]
    fn of_no_pages_there_is_nothing() {
        let set = PageSet::none_of(14000);
        let packed = Packed::new(&set, &RANGES);
        assert_eq!((packed.len, packed.runs(0, PAGE_SIZE).next()), (0, None));
    }

    proptest! {
        #[test]
        fn every_page_is_where_it_is_counted(
            numbers in proptest::collection::btree_set(0u64..14000, 1..200),
            first in any::<prop::sample::Index>(),
            count in 1u64..100,
        ) {
            let mut set = PageSet::none_of(14000);
            numbers.iter().for_each(|page| set.insert(*page..page + 1));
            let numbers: Vec<_> = numbers.into_iter().collect();
            let first = first.index(numbers.len());
            let packed = Packed::new(&set, &RANGES);
            let found = pages(packed.runs(first as u64 * PAGE_SIZE, count * PAGE_SIZE));
            let end = numbers.len().min(first + count as usize);
            prop_assert_eq!(found, &numbers[first..end]);
        }
    }
}
