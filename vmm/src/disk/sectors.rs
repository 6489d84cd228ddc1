//! A set of sectors of a disk.
//!
//! In: ranges of sectors. Out: whether one is in it, and runs of those that are. Holds: it takes memory for what is in it, and at most
//! a bit for each sector of the disk.

use std::collections::BTreeMap;

/// Sectors of one leaf: 16 MiB of the disk.
const LEAF: u64 = 64 * WORDS as u64;
const WORDS: usize = 512;

/// The set.
#[derive(Debug, Default)]
pub(super) struct Sectors {
    leaves: BTreeMap<u64, Leaf>,
}

#[derive(Debug)]
enum Leaf {
    All,
    Some(Box<[u64; WORDS]>),
}

impl Leaf {
    fn has(&self, sector: u64) -> bool {
        match self {
            Self::All => true,
            Self::Some(words) => words[(sector / 64) as usize] & 1 << (sector % 64) != 0,
        }
    }

    fn add(&mut self, sectors: std::ops::Range<u64>) {
        let Self::Some(words) = self else { return };
        for sector in sectors {
            words[(sector / 64) as usize] |= 1 << (sector % 64);
        }
        if words.iter().all(|&word| word == u64::MAX) {
            *self = Self::All;
        }
    }

    /// Runs of sectors that are in it: the first and how many.
    fn runs(&self) -> Vec<(u64, u64)> {
        let Self::Some(words) = self else { return vec![(0, LEAF)] };
        let has = |sector: &u64| words[(sector / 64) as usize] & 1 << (sector % 64) != 0;
        let sectors: Vec<u64> = (0..LEAF).filter(has).collect();
        sectors.chunk_by(|one, next| one + 1 == *next).map(|run| (run[0], run.len() as u64)).collect()
    }
}

impl Sectors {
    /// Adds so many from the first on.
    pub(super) fn add(&mut self, first: u64, count: u64) {
        let end = first + count;
        let mut at = first;
        while at < end {
            let (leaf, start) = (at / LEAF, at % LEAF);
            let stop = (end - leaf * LEAF).min(LEAF);
            if (start, stop) == (0, LEAF) {
                self.leaves.insert(leaf, Leaf::All);
            } else {
                let empty = || Leaf::Some(Box::new([0; WORDS]));
                self.leaves.entry(leaf).or_insert_with(empty).add(start..stop);
            }
            at = leaf * LEAF + stop;
        }
    }

    /// How many from the first on, at most `max`, are in it, or are not.
    pub(super) fn alike(&self, first: u64, max: u64) -> (u64, bool) {
        let has = |sector: u64| self.leaves.get(&(sector / LEAF)).is_some_and(|leaf| leaf.has(sector % LEAF));
        let first_is_in = has(first);
        let others = (1..max).take_while(|&count| has(first + count) == first_is_in).count();
        (1 + others as u64, first_is_in)
    }

    /// Runs of sectors that are in it, in order: the first and how many.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.leaves.iter().flat_map(|(index, leaf)| {
            leaf.runs().into_iter().map(move |(first, count)| (index * LEAF + first, count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_in_it_and_nothing_else() {
        let mut sectors = Sectors::default();
        assert_eq!(sectors.alike(7, 100), (100, false));
        sectors.add(10, 5);
        sectors.add(14, 3);
        assert_eq!(sectors.alike(0, 100), (10, false));
        assert_eq!(sectors.alike(10, 100), (7, true));
        assert_eq!(sectors.alike(10, 2), (2, true));
        assert_eq!(sectors.runs().collect::<Vec<_>>(), [(10, 7)]);
    }

    #[test]
    fn ranges_go_over_leaves() {
        let mut sectors = Sectors::default();
        sectors.add(LEAF - 1, 2 * LEAF + 2);
        assert_eq!(sectors.alike(LEAF - 2, 4 * LEAF), (1, false));
        assert_eq!(sectors.alike(LEAF - 1, 4 * LEAF), (2 * LEAF + 2, true));
        let runs: Vec<_> = sectors.runs().collect();
        assert_eq!(runs, [(LEAF - 1, 1), (LEAF, LEAF), (2 * LEAF, LEAF), (3 * LEAF, 1)]);
        assert_eq!(sectors.leaves.values().filter(|leaf| matches!(leaf, Leaf::All)).count(), 2);
    }

    #[test]
    fn a_leaf_that_fills_up_takes_no_more_memory_than_one_that_was_full() {
        let mut sectors = Sectors::default();
        (0..LEAF).rev().for_each(|sector| sectors.add(sector, 1));
        assert!(matches!(sectors.leaves[&0], Leaf::All));
        // The largest disk there can be.
        let last = u64::MAX / 512;
        sectors.add(last, 1);
        assert_eq!(sectors.alike(last, 1), (1, true));
    }
}
