//! Incremental snapshots: which pages a file has, and whose the others are.
//!
//! In: pages that changed since a parent was written. Out: a section of the machine state, and back. Holds: a file's list has exactly as
//! many pages as its RAM, whoever wrote it, and exactly as many of them as the file holds; a page that is not in the list is the parent's.

use crate::{
    GenerationId, Manifest, PAGE_SIZE, PageSet, RamRange, Section, SectionError, SectionRef, Snapshot, chunk,
};
use serde::{Deserialize, Serialize};

/// Name of the section.
pub const DELTA: &str = "delta";
/// In files of version 1 RAM lay as in a full snapshot, with holes for what is the parent's.
const VERSION: u32 = 2;
/// Most bytes of the hint where the parent is.
pub const HINT_MAX: usize = 4096;

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
    /// [`Snapshot::ram_digest`]: another file of the same id is not it.
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

    /// Of a snapshot with this manifest and so many bytes of packed pages, if its RAM is packed; `None` if it is no incremental one.
    pub(crate) fn decode(
        manifest: &Manifest,
        section: Option<SectionRef<'_>>,
        packed: Option<u64>,
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
        let held = packed.ok_or(DeltaError::Wrong("the file's RAM is not packed"))? / PAGE_SIZE;
        if changed.len() != held {
            return Err(DeltaError::Pages { listed: changed.len(), held });
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
    /// It is another file's.
    #[error("it has {listed} pages, and the file holds {held}")]
    Pages {
        /// Pages that it names.
        listed: u64,
        /// Pages that are there.
        held: u64,
    },
}

/// XXH3, 64 bits, seed 0, of a chunk table, and of which pages these are if they are not all.
pub(crate) fn ram_digest(table: &[u64], changed: Option<&PageSet>) -> u64 {
    let mut bytes = chunk::encode_table(table);
    bytes.extend(changed.into_iter().flat_map(PageSet::bits));
    chunk::digest(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_numbered_without_the_hole() {
        let ranges = [RamRange { gpa: 0, len: 0x3000 }, RamRange { gpa: 1 << 32, len: 0x2000 }];
        assert_eq!(pages(&ranges), 5);
        assert_eq!(page_number(&ranges, (1 << 32) + 0x1000), Some(4));
        assert_eq!(page_number(&ranges, 0x3000), None);
    }
}
