//! Sets of pages.
//!
//! In: numbers of pages, in the order of guest addresses. Out: which there are, in runs. Holds: a bit for each page of RAM, and none beyond it.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A set of pages of RAM, numbered in the order of guest addresses: holes between RAM ranges have no numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSet {
    pages: u64,
    /// A bit for each page, the lowest of a byte first.
    bits: Vec<u8>,
}

impl PageSet {
    /// None of so many pages.
    pub fn none_of(pages: u64) -> Self {
        Self { pages, bits: vec![0; pages.div_ceil(8) as usize] }
    }

    /// Adds these; what goes past the end is left out.
    pub fn insert(&mut self, pages: Range<u64>) {
        for page in pages.start..pages.end.min(self.pages) {
            self.bits[(page / 8) as usize] |= 1 << (page % 8);
        }
    }

    /// Adds the pages for which a bit is set, the lowest of a word first; the first bit is page `first`'s.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        for (word, at) in words.iter().zip((first..).step_by(64)).filter(|(word, _)| **word != 0) {
            (0..64).filter(|bit| word >> bit & 1 == 1).for_each(|bit| self.insert(at + bit..at + bit + 1));
        }
    }

    /// Whether it has this page.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.bits[(page / 8) as usize] >> (page % 8) & 1 == 1
    }

    /// Adds all that another set of as many pages has.
    pub fn insert_all(&mut self, other: &Self) {
        self.bits.iter_mut().zip(&other.bits).for_each(|(own, bits)| *own |= bits);
    }

    /// How many there are in it.
    pub fn len(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }

    /// How many of those among `within` there are in it.
    pub fn count(&self, within: Range<u64>) -> u64 {
        let (start, end) = (within.start, within.end.min(self.pages));
        let whole = start.div_ceil(8)..end / 8;
        if whole.is_empty() {
            return (start..end).filter(|page| self.contains(*page)).count() as u64;
        }
        let edges = (start..whole.start * 8).chain(whole.end * 8..end);
        let bytes = &self.bits[whole.start as usize..whole.end as usize];
        let inside: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
        inside + edges.filter(|page| self.contains(*page)).count() as u64
    }

    /// A bit for each page, the lowest of a byte first.
    pub(crate) fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// The longest runs, in order, of those among `within`.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = within.end.min(self.pages);
        let mut at = within.start;
        std::iter::from_fn(move || {
            let start = self.next(at, end, true)?;
            at = self.next(start, end, false).unwrap_or(end);
            Some(start..at)
        })
    }

    /// The first page from `at` on, before `end`, that is in the set or not.
    fn next(&self, mut at: u64, end: u64, wanted: bool) -> Option<u64> {
        let nothing = if wanted { 0 } else { u8::MAX };
        while at < end {
            let byte = self.bits[(at / 8) as usize];
            if at.is_multiple_of(8) && byte == nothing {
                at += 8;
            } else if (byte >> (at % 8) & 1 == 1) == wanted {
                return Some(at);
            } else {
                at += 1;
            }
        }
        None
    }

    pub(crate) fn is_of(&self, pages: u64) -> bool {
        let spare = (self.bits.len() as u64 * 8).checked_sub(self.pages);
        let clean = |spare| self.bits.last().is_none_or(|last| u16::from(*last) >> (8 - spare) == 0);
        self.pages == pages && spare.is_some_and(|spare| spare < 8 && clean(spare))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_are_the_longest_there_are() {
        let mut set = PageSet::none_of(100);
        set.insert(3..5);
        set.insert(5..40);
        set.insert(98..200);
        assert_eq!(set.runs(0..100).collect::<Vec<_>>(), [3..40, 98..100]);
        assert_eq!(set.runs(8..20).next(), Some(8..20));
        assert_eq!((set.len(), set.is_of(100), set.is_of(99)), (39, true, false));
        assert!(PageSet::none_of(9).is_empty() && PageSet::none_of(9).runs(0..9).next().is_none());
    }

    #[test]
    fn words_are_64_pages_each() {
        let mut set = PageSet::none_of(200);
        set.insert_words(3, &[0b101, 0, 1 << 63 | 1]);
        assert_eq!(set.runs(0..200).collect::<Vec<_>>(), [3..4, 5..6, 131..132, 194..195]);
        set.insert_words(190, &[u64::MAX]);
        assert!(set.contains(199) && !set.contains(200) && !set.contains(189));
        assert!(set.is_of(200));
    }

    #[test]
    fn a_page_beyond_the_last_makes_a_set_no_set() {
        let set = PageSet { pages: 4, bits: vec![0x10] };
        assert!(!set.is_of(4));
        assert!(!PageSet { pages: 4, bits: vec![0, 0] }.is_of(4));
        assert!(!PageSet { pages: 4, bits: vec![] }.is_of(4));
    }

    proptest! {
        #[test]
        fn runs_have_what_was_inserted(pages in proptest::collection::btree_set(0u64..200, 0..60)) {
            let mut set = PageSet::none_of(200);
            pages.iter().for_each(|page| set.insert(*page..page + 1));
            for within in [0..200, 3..5, 7..90, 64..128, 119..119] {
                prop_assert_eq!(set.count(within.clone()), pages.iter().filter(|page| within.contains(page)).count() as u64);
            }
            prop_assert_eq!(set.runs(0..200).flatten().collect::<Vec<_>>(), pages.into_iter().collect::<Vec<_>>());
        }
    }
}
