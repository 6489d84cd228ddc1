//! What a disk holds after a power cut.
//!
//! In: the files of a directory before, and what was done to them. Out: the files that could be there after the power was cut at
//! any point, depending on luck. Holds: what was synced is there; of what was not, any part may be; names change in the order in
//! which they were changed, as a journal has them.

use super::calls::{Change, Done};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Which of the changes that nobody synced are on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Luck {
    /// None.
    Worst,
    /// Names, but no bytes.
    OnlyNames,
    /// All.
    Best,
    /// Some, by this seed.
    Some(u64),
}

/// A directory's files, and all that was done to them.
pub struct Disk {
    names: BTreeMap<PathBuf, usize>,
    objects: Vec<Vec<u8>>,
    inodes: BTreeMap<u64, usize>,
}

impl Disk {
    /// The files of `dir` as they are, all of them on the disk.
    ///
    /// # Errors
    /// They can't be read.
    pub fn of(dir: &Path) -> Result<Self> {
        let mut disk = Self { names: BTreeMap::new(), objects: Vec::new(), inodes: BTreeMap::new() };
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let about = fs::metadata(&path)?;
            if about.is_file() {
                disk.inodes.insert(about.ino(), disk.objects.len());
                disk.names.insert(path.clone(), disk.objects.len());
                disk.objects.push(fs::read(&path)?);
            }
        }
        Ok(disk)
    }

    /// Writes what is there if the power is cut after so many of the calls to `dir`.
    ///
    /// # Errors
    /// A call to a file that is not known; `dir` takes no files.
    pub fn after_a_power_cut(&self, done: &[Done], cut: usize, luck: Luck, dir: &Path) -> Result<()> {
        let mut left = Remains { disk: self.clone_of(), waiting: BTreeMap::new(), names: Vec::new() };
        for done in done[..cut].iter().filter_map(|done| done.change.as_ref()) {
            left.happens(done)?;
        }
        left.settle(luck).write(dir)
    }

    fn clone_of(&self) -> Self {
        Self { names: self.names.clone(), objects: self.objects.clone(), inodes: self.inodes.clone() }
    }

    fn object(&self, inode: u64) -> Result<usize> {
        self.inodes.get(&inode).copied().context("a call to a file that nobody made")
    }

    fn write(&self, dir: &Path) -> Result<()> {
        for (path, &object) in &self.names {
            let name = path.file_name().context("a file without a name")?;
            let file = fs::File::create(dir.join(name))?;
            file.set_len(self.objects[object].len() as u64)?;
            file.write_all_at(&self.objects[object], 0)?;
        }
        Ok(())
    }
}

/// A change of the name space.
#[derive(Clone)]
enum Naming {
    Is(PathBuf, usize),
    Moves(PathBuf, PathBuf),
    Gone(PathBuf),
}

/// What is on the disk, and what waits to get there.
struct Remains {
    disk: Disk,
    /// For each object.
    waiting: BTreeMap<usize, Vec<Change>>,
    names: Vec<Naming>,
}

impl Remains {
    fn happens(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Created { inode, path } => {
                let object = self.disk.objects.len();
                self.disk.objects.push(Vec::new());
                self.disk.inodes.insert(*inode, object);
                self.names.extend(path.iter().map(|path| Naming::Is(path.clone(), object)));
            }
            Change::Written { inode, .. } | Change::Resized { inode, .. } => {
                let object = self.disk.object(*inode)?;
                self.waiting.entry(object).or_default().push(change.clone());
            }
            Change::Synced { inode } => {
                let object = self.disk.object(*inode)?;
                let waited = self.waiting.remove(&object).unwrap_or_default();
                waited.iter().for_each(|change| apply(&mut self.disk.objects[object], change));
            }
            Change::DirectorySynced => {
                std::mem::take(&mut self.names).into_iter().for_each(|naming| self.name(naming));
            }
            Change::Renamed { from, to } => self.names.push(Naming::Moves(from.clone(), to.clone())),
            Change::Linked { inode, to } => {
                self.names.push(Naming::Is(to.clone(), self.disk.object(*inode)?));
            }
            Change::Removed { path } => self.names.push(Naming::Gone(path.clone())),
            Change::Attributes => {}
        }
        Ok(())
    }

    fn name(&mut self, naming: Naming) {
        let names = &mut self.disk.names;
        match naming {
            Naming::Is(path, object) => drop(names.insert(path, object)),
            Naming::Moves(from, to) => {
                let object = names.remove(&from);
                object.map(|object| names.insert(to, object));
            }
            Naming::Gone(path) => drop(names.remove(&path)),
        }
    }

    /// What waited gets there or not.
    fn settle(mut self, luck: Luck) -> Disk {
        let mut dice = Dice::new(match luck {
            Luck::Some(seed) => seed,
            _ => 1,
        });
        let names = std::mem::take(&mut self.names);
        let kept = match luck {
            Luck::Worst => 0,
            Luck::OnlyNames | Luck::Best => names.len(),
            Luck::Some(_) => dice.below(names.len() as u64 + 1) as usize,
        };
        names.into_iter().take(kept).for_each(|naming| self.name(naming));
        for (object, waited) in std::mem::take(&mut self.waiting) {
            for change in &waited {
                let lucky = match luck {
                    Luck::Worst | Luck::OnlyNames => false,
                    Luck::Best => true,
                    Luck::Some(_) => dice.below(2) == 1,
                };
                if lucky {
                    apply(&mut self.disk.objects[object], change);
                }
            }
        }
        self.disk
    }
}

fn apply(object: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Resized { len, .. } => object.resize(*len as usize, 0),
        Change::Written { offset, bytes, .. } => {
            let end = *offset as usize + bytes.len();
            object.resize(object.len().max(end), 0);
            object[*offset as usize..end].copy_from_slice(bytes);
        }
        _ => {}
    }
}

/// Numbers that look random and are the same each time (xorshift).
pub struct Dice(u64);

impl Dice {
    /// By a seed other than 0.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next, from 0 on.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
