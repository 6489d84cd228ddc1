//! Incremental snapshots: which pages a file has, and whose the others are.
//!
//! In: pages that changed since a parent was written. Out: a section of the machine state, and back. Holds: a file's list has exactly as
//! many pages as its RAM, whoever wrote it; a page that is not in the list is a hole of the file, and is the parent's.

use crate::{GenerationId, Manifest, PAGE_SIZE, RamRange, Section, SectionError, SectionRef, Snapshot};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Name of the section.
pub const DELTA: &str = "delta";
const VERSION: u32 = 1;
/// Most bytes of the hint where the parent is.
pub const HINT_MAX: usize = 4096;

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

    fn is_of(&self, pages: u64) -> bool {
        let spare = (self.bits.len() as u64 * 8).checked_sub(self.pages);
        let clean = |spare| self.bits.last().is_none_or(|last| u16::from(*last) >> (8 - spare) == 0);
        self.pages == pages && spare.is_some_and(|spare| spare < 8 && clean(spare))
    }
}

/// Pages of RAM with these ranges.
pub fn pages(ranges: &[RamRange]) -> u64 {
    ranges.iter().map(|range| range.len / PAGE_SIZE).sum()
}

/// The number of the page at `gpa`, which is in one of the ranges.
pub fn page_number(ranges: &[RamRange], gpa: u64) -> Option<u64> {
    let mut first = 0;
    for range in ranges {
        if (range.gpa..range.gpa + range.len).contains(&gpa) {
            return Some(first + (gpa - range.gpa) / PAGE_SIZE);
        }
        first += range.len / PAGE_SIZE;
    }
    None
}

/// What makes a snapshot an incremental one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// The snapshot that it is a difference to.
    pub parent: Parent,
    /// What changed since.
    pub changed: PageSet,
}

/// The snapshot that another is a difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its id.
    pub generation: GenerationId,
    /// XXH3 of its chunk table: another file of the same id is not it.
    pub digest: u64,
    /// Where it was: a name in the same directory, or an absolute path. It may have moved.
    pub hint: String,
}

impl Parent {
    /// This snapshot, as one in the directory of `child` will know it.
    pub fn of(snapshot: &Snapshot, child: &std::path::Path) -> Self {
        let path = std::path::absolute(snapshot.path()).unwrap_or_else(|_| snapshot.path().to_owned());
        let child = std::path::absolute(child).unwrap_or_else(|_| child.to_owned());
        let beside = path.file_name().filter(|_| path.parent() == child.parent());
        let hint = beside.map_or(path.as_os_str(), |name| name).to_string_lossy().into_owned();
        Self { generation: snapshot.manifest().about.generation, digest: snapshot.ram_digest(), hint }
    }
}

/// As it is in the section; the parent's id is in the manifest.
#[derive(Serialize, Deserialize)]
struct Encoded {
    digest: u64,
    hint: String,
    changed: PageSet,
}

impl Delta {
    /// Its section.
    pub(crate) fn encode(&self) -> Result<Section, SectionError> {
        let Parent { digest, hint, .. } = self.parent.clone();
        Section::encode(DELTA, VERSION, &Encoded { digest, hint, changed: self.changed.clone() })
    }

    /// Of a snapshot with this manifest; `None` if it is no incremental one.
    pub(crate) fn decode(
        manifest: &Manifest,
        section: Option<SectionRef<'_>>,
    ) -> Result<Option<Self>, DeltaError> {
        let (generation, section) = match (manifest.parent, section) {
            (None, None) => return Ok(None),
            (Some(generation), Some(section)) => (generation, section),
            (None, Some(_)) => return Err(DeltaError::Wrong("it has one, but no parent")),
            (Some(_), None) => return Err(DeltaError::Wrong("there is none")),
        };
        let Encoded { digest, hint, changed } = section.decode(VERSION)?;
        if !changed.is_of(pages(&manifest.ram.ranges)) {
            return Err(DeltaError::Wrong("it is not of as many pages as RAM has"));
        }
        if hint.len() > HINT_MAX || hint.chars().any(char::is_control) {
            return Err(DeltaError::Wrong("its parent's path is no line of text"));
        }
        if generation == manifest.about.generation {
            return Err(DeltaError::Wrong("it is its own parent"));
        }
        Ok(Some(Self { parent: Parent { generation, digest, hint }, changed }))
    }
}

/// What is wrong with an incremental snapshot's list of pages.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// It does not decode.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// It decodes to what can't be.
    #[error("{0}")]
    Wrong(&'static str),
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

    #[test]
    fn pages_are_numbered_without_the_hole() {
        let ranges = [RamRange { gpa: 0, len: 0x3000 }, RamRange { gpa: 1 << 32, len: 0x2000 }];
        assert_eq!(pages(&ranges), 5);
        assert_eq!(page_number(&ranges, (1 << 32) + 0x1000), Some(4));
        assert_eq!(page_number(&ranges, 0x3000), None);
    }

    proptest! {
        #[test]
        fn runs_have_what_was_inserted(pages in proptest::collection::btree_set(0u64..200, 0..60)) {
            let mut set = PageSet::none_of(200);
            pages.iter().for_each(|page| set.insert(*page..page + 1));
            prop_assert_eq!(set.runs(0..200).flatten().collect::<Vec<_>>(), pages.into_iter().collect::<Vec<_>>());
        }
    }
}
