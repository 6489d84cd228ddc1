//! Chains: an incremental snapshot, its parent, that one's parent, down to a full one.
//!
//! In: the path of the last. Out: all of them, open and checked, and whose each page of RAM is. Holds: each is the very parent that its
//! child names, of the same RAM; a chain has an end, and no more than [`CHAIN_MAX`] links.

use crate::delta::{self, Parent};
use crate::{
    GenerationId, OpenError, PAGE_SIZE, RamError, RamSummary, SealError, SealKey, Snapshot,
    UnverifiedSnapshot, VerifyError,
};
use std::path::{Path, PathBuf};

/// Most snapshots in a chain.
pub const CHAIN_MAX: usize = 64;

/// A snapshot with all that it needs; often it is alone.
#[derive(Debug)]
pub struct Chain {
    /// The last first.
    links: Vec<Snapshot>,
}

/// A part of RAM that lies in one file of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which of [`Chain::links`].
    pub link: usize,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where in that file it begins.
    pub offset: u64,
}

/// A snapshot can't be had with all that it needs.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is damaged, or something else.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Its parent is nowhere.
    #[error("{} is a difference to snapshot {parent}, which is not there: it was {}", child.display(), hint.display())]
    Missing {
        /// The one that needs it.
        child: PathBuf,
        /// The parent's id.
        parent: GenerationId,
        /// Where it was.
        hint: PathBuf,
    },
    /// Something else is in its place.
    #[error("{} is a difference to snapshot {parent}, and {} is {found}", child.display(), place.display())]
    Wrong {
        /// The one that needs it.
        child: PathBuf,
        /// The parent's id.
        parent: GenerationId,
        /// Where it should be.
        place: PathBuf,
        /// What is there.
        found: String,
    },
    /// It comes back to itself.
    #[error("{}: its parents come back to snapshot {generation}", child.display())]
    Loop {
        /// The last that is none again.
        child: PathBuf,
        /// The one that is come back to.
        generation: GenerationId,
    },
    /// It is too long.
    #[error("{}: a chain of more than {CHAIN_MAX} snapshots; vmm flatten makes one of a chain", .0.display())]
    TooLong(PathBuf),
}

impl Chain {
    /// Opens a snapshot with all its parents, and checks all but their RAM.
    ///
    /// # Errors
    /// One that is damaged, or a parent that is missing or another.
    pub fn open(path: &Path) -> Result<Self, ChainError> {
        let mut links = vec![UnverifiedSnapshot::open(path)?.verify_link()?];
        while let Some(delta) = links[links.len() - 1].delta() {
            let child = &links[links.len() - 1];
            if links.len() >= CHAIN_MAX {
                return Err(ChainError::TooLong(path.to_owned()));
            }
            let generation = delta.parent.generation;
            if links.iter().any(|link| link.manifest().about.generation == generation) {
                return Err(ChainError::Loop { child: child.path().to_owned(), generation });
            }
            let parent = find(child, &delta.parent)?;
            links.push(parent);
        }
        Ok(Self { links })
    }

    /// Refuses a chain of which any was not written with this key; see [`Snapshot::authenticate`].
    ///
    /// # Errors
    /// The first that was not.
    pub fn authenticate(self, key: &SealKey) -> Result<Self, SealError> {
        let links = self.links.into_iter().map(|link| link.authenticate(key));
        Ok(Self { links: links.collect::<Result<_, _>>()? })
    }

    /// The snapshot.
    pub fn top(&self) -> &Snapshot {
        &self.links[0]
    }

    /// It and its parents.
    pub fn links(&self) -> &[Snapshot] {
        &self.links
    }

    /// Bytes of RAM in all of them, holes included.
    pub fn ram_bytes(&self) -> u64 {
        self.links.iter().map(Snapshot::ram_bytes).sum()
    }

    /// As [`Snapshot::verify_ram`], of all of them.
    ///
    /// # Errors
    /// The first chunk that differs or cannot be read.
    pub fn verify_ram(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<RamSummary, RamError> {
        let (mut all, total) = (RamSummary::default(), self.ram_bytes());
        for link in &self.links {
            let RamSummary { ram_bytes, hole_bytes } =
                link.verify_ram(&mut |done, _| progress(all.ram_bytes + done, total))?;
            all.ram_bytes += ram_bytes;
            all.hole_bytes += hole_bytes;
        }
        Ok(all)
    }

    /// Whether it needs parents.
    pub fn is_incremental(&self) -> bool {
        self.links.len() > 1
    }

    /// Where all of RAM is, in the order of guest addresses. Neighbours are of different files, or of different RAM ranges.
    pub fn pieces(&self) -> Vec<Piece> {
        let ranges = &self.top().manifest().ram.ranges;
        let total = delta::pages(ranges);
        let mut owners = vec![(self.links.len() - 1) as u8; total as usize];
        for (link, snapshot) in self.links.iter().enumerate().rev() {
            let changed = snapshot.delta().map(|delta| delta.changed.runs(0..total));
            for run in changed.into_iter().flatten() {
                owners[run.start as usize..run.end as usize].fill(link as u8);
            }
        }
        let mut places: Vec<_> = self.links.iter().map(Places::of).collect();
        let mut pieces = Vec::new();
        let mut rest = owners.as_slice();
        let mut page = 0;
        for (index, range) in ranges.iter().enumerate() {
            let (own, after) = rest.split_at((range.len / PAGE_SIZE) as usize);
            let mut gpa = range.gpa;
            for run in own.chunk_by(|one, next| one == next) {
                let (link, len) = (usize::from(run[0]), run.len() as u64 * PAGE_SIZE);
                let offset = places[link].offset(index, gpa - range.gpa, page);
                pieces.push(Piece { link, gpa, len, offset });
                gpa += len;
                page += run.len() as u64;
            }
            rest = after;
        }
        pieces
    }
}

/// Where the pages of a file are, asked for in order.
struct Places<'a> {
    of: &'a Snapshot,
    /// Pages that are counted, and how many of them it has.
    counted: u64,
    before: u64,
}

impl<'a> Places<'a> {
    fn of(of: &'a Snapshot) -> Self {
        Self { of, counted: 0, before: 0 }
    }

    /// Of a page, which is not before the last one that was asked for, and which so many bytes of a RAM range precede.
    fn offset(&mut self, range: usize, at: u64, page: u64) -> u64 {
        let ram = self.of.ram();
        let Some(delta) = self.of.delta() else { return ram[range].offset + at };
        self.before += delta.changed.count(self.counted..page);
        self.counted = page;
        ram[0].offset + self.before * PAGE_SIZE
    }
}

/// One that needs no other.
impl From<Snapshot> for Chain {
    fn from(full: Snapshot) -> Self {
        debug_assert!(full.delta().is_none());
        Self { links: vec![full] }
    }
}

/// Where the child says, or beside the child.
fn find(child: &Snapshot, parent: &Parent) -> Result<Snapshot, ChainError> {
    let hint = Path::new(&parent.hint);
    let directory = child.path().parent().unwrap_or(Path::new(""));
    let beside = hint.file_name().map(|name| directory.join(name));
    let mut places = vec![directory.join(hint)];
    places.extend(beside.filter(|place| *place != places[0]));
    let mut error = None;
    for place in places.iter().filter(|place| place.exists()) {
        match candidate(child, parent, place) {
            Ok(found) => return Ok(found),
            Err(wrong) => error = error.or(Some(wrong)),
        }
    }
    let missing = || ChainError::Missing {
        child: child.path().to_owned(),
        parent: parent.generation,
        hint: places[0].clone(),
    };
    Err(error.unwrap_or_else(missing))
}

fn candidate(child: &Snapshot, parent: &Parent, place: &Path) -> Result<Snapshot, ChainError> {
    let found = UnverifiedSnapshot::open(place)?.verify_link()?;
    let wrong = |what: String| ChainError::Wrong {
        child: child.path().to_owned(),
        parent: parent.generation,
        place: place.to_owned(),
        found: what,
    };
    let generation = found.manifest().about.generation;
    if generation != parent.generation {
        return Err(wrong(format!("snapshot {generation}")));
    }
    if found.ram_digest() != parent.digest || found.manifest().ram != child.manifest().ram {
        return Err(wrong("one of that id with other RAM".to_owned()));
    }
    Ok(found)
}
