//! A machine with a disk, a snapshot of it, and another that is about to take its place.
//!
//! In: which call of the second snapshot is to go wrong. Out: which of the two is there afterwards, and whether it is whole. Holds:
//! every byte is looked at: headers, notes, RAM, the disks kept beside it.

use super::{Disk, Done, Luck, Plan, Tracer};
use crate::guests::Guest;
use crate::vm::{TestVm, text};
use anyhow::{Context, Result, bail, ensure};
use snapshot::{GenerationId, publish};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};
use vmm::disk::{Digest, DiskFile};
use vmm::load;

/// What is there under the snapshot's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The snapshot that was there before.
    Old,
    /// The other one.
    New,
}

/// How its snapshots are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By one thread, as it is where there is little RAM.
    Alone,
    /// By several, with more data than is left to the host to write when it likes.
    ByThreads,
    /// With the disks.
    WithDisks,
    /// While the machine runs.
    Live,
    /// Only what changed since the one that the machine was restored from, which is elsewhere.
    Incremental,
}

impl Way {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Alone, Self::ByThreads, Self::WithDisks, Self::Live, Self::Incremental];

    /// Of some RAM, with something in it.
    fn guest(self, dir: &Path) -> Result<Guest> {
        Ok(match self {
            Self::ByThreads => Guest::bare("dirty", dir)?.memory("26M").cmdline("size=10 rate=100"),
            _ => Guest::bare("counter", dir)?.memory("4M"),
        })
    }

    /// The machine, and what it is asked for with each snapshot.
    fn start(self, guest: &Guest, dir: &Path) -> Result<(TestVm, Vec<String>)> {
        let mut vm = TestVm::start(&guest.run_args())?;
        vm.wait_for(guest.pulse)?;
        let parent = dir.join("parent");
        if self == Self::Incremental {
            vm.snapshot_and_stop(&parent)?;
            vm = TestVm::restore(&parent)?;
        }
        let arguments = match self {
            Self::Alone | Self::ByThreads => vec![],
            Self::WithDisks => vec!["--with-disks", "--digest-disks"],
            Self::Live => vec!["--live"],
            Self::Incremental => vec!["--parent", text(&parent)?],
        };
        Ok((vm, arguments.into_iter().map(str::to_owned).collect()))
    }
}

/// A running machine, and the directory with its snapshot and nothing else.
pub struct Scene {
    vm: TestVm,
    snapshots: TempDir,
    arguments: Vec<String>,
    old: GenerationId,
    pulse: &'static str,
    _files: TempDir,
}

/// A call of `vmm snapshot` that was watched.
pub struct Attempt {
    /// What it did.
    pub done: Vec<Done>,
    /// What it printed, or its error.
    pub answer: Result<serde_json::Value>,
}

impl Scene {
    /// A machine of some RAM with something in it, and a disk; its first snapshot is taken in this way, as all others will be.
    ///
    /// # Errors
    /// No such machine, or no snapshot.
    pub fn new(way: Way) -> Result<Self> {
        let (files, snapshots) = (tempdir()?, tempdir()?);
        let disk = files.path().join("disk");
        fs::write(&disk, [[7; 8192], [0; 8192], [9; 8192]].concat())?;
        let guest = way.guest(files.path())?.argument("--disk", &format!("path={},id=data", disk.display()));
        let (vm, arguments) = way.start(&guest, files.path())?;
        snapshot(&vm, &snapshots.path().join("saved"), &arguments)?;
        let old = generation(&snapshots.path().join("saved"))?;
        Ok(Self { vm, snapshots, arguments, old, pulse: guest.pulse, _files: files })
    }

    /// The snapshot.
    pub fn path(&self) -> PathBuf {
        self.snapshots.path().join("saved")
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.snapshots.path()
    }

    /// Takes another snapshot of that name.
    ///
    /// # Errors
    /// Only of the watch itself.
    pub fn again(&self, plan: Plan) -> Result<Attempt> {
        let tracer = Tracer::attach(self.vm.pid(), self.dir(), plan)?;
        let answer = snapshot(&self.vm, &self.path(), &self.arguments);
        Ok(Attempt { done: tracer.finish()?, answer })
    }

    /// Which of the two is there, having looked at all of it. The new one is the old one from now on.
    ///
    /// # Errors
    /// It is none of them, or not whole.
    pub fn found(&mut self) -> Result<Found> {
        let found = self.found_in(self.dir())?;
        self.old = generation(&self.path())?;
        Ok(found)
    }

    /// The same of a copy of the directory.
    ///
    /// # Errors
    /// It is none of them, or not whole.
    pub fn found_in(&self, dir: &Path) -> Result<Found> {
        let path = dir.join("saved");
        whole(&path)?;
        Ok(if generation(&path)? == self.old { Found::Old } else { Found::New })
    }

    /// The machine goes on.
    ///
    /// # Errors
    /// It does not.
    pub fn lives(&mut self) -> Result<()> {
        self.vm.wait_for(self.pulse)?;
        ensure!(self.vm.ask("status", &[])?["state"] == "running", "it does not run");
        Ok(())
    }

    /// Nothing is in the directory but the snapshot and what belongs to it.
    ///
    /// # Errors
    /// Names what else there is.
    pub fn is_tidy(&self) -> Result<()> {
        let mine = kept(&self.path())?.into_iter().chain([self.path()]).collect::<Vec<_>>();
        let other = fs::read_dir(self.dir())?.flatten().find(|entry| !mine.contains(&entry.path()));
        ensure!(other.is_none(), "{other:?} is left behind");
        Ok(())
    }

    /// The machine was killed; it may have left files, which their names show for what they are.
    ///
    /// # Errors
    /// It was not, or left something else.
    pub fn was_killed(&mut self) -> Result<()> {
        // The tracer, of this process too, may have heard of its end first, and then there is nothing to wait for.
        ensure!(self.vm.wait().is_err() && self.vm.signal(0).is_err(), "it was not killed");
        for entry in fs::read_dir(self.dir())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let known = name.starts_with("saved") || name.starts_with(publish::TEMPORARY);
            ensure!(known, "{name} is left behind");
        }
        Ok(())
    }

    /// The files as they are now.
    ///
    /// # Errors
    /// They can't be read.
    pub fn disk(&self) -> Result<Disk> {
        Disk::of(self.dir())
    }

    /// What is there after the power was cut at that call.
    ///
    /// # Errors
    /// Neither of the two, or not whole.
    pub fn after_a_power_cut(&self, before: &Disk, done: &[Done], cut: usize, luck: Luck) -> Result<Found> {
        let dir = tempdir()?;
        before.after_a_power_cut(done, cut, luck, dir.path())?;
        let last = done[..cut].last().map_or("the start", |done| done.name);
        self.found_in(dir.path()).with_context(|| format!("call {cut}, after {last}, luck {luck:?}"))
    }
}

/// The machine runs on afterwards.
fn snapshot(vm: &TestVm, path: &Path, arguments: &[String]) -> Result<serde_json::Value> {
    let arguments: Vec<_> = [text(path)?].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    vm.ask("snapshot", &arguments)
}

pub(crate) fn generation(path: &Path) -> Result<GenerationId> {
    Ok(load::open_chain(path)?.top().manifest().about.generation)
}

/// The disks kept beside it.
fn kept(path: &Path) -> Result<Vec<PathBuf>> {
    let records = load::disks(load::open_chain(path)?.top())?;
    let files = records.iter().filter_map(|record| record.kept.as_ref());
    Ok(files.map(|kept| path.with_file_name(&kept.file)).collect())
}

/// All chunks have their digests, so have the kept disks.
pub(crate) fn whole(path: &Path) -> Result<()> {
    let chain = load::open_chain(path)?;
    chain.verify_ram(&mut |_, _| {}).with_context(|| format!("{}", path.display()))?;
    load::state(chain.top())?;
    for record in load::disks(chain.top())? {
        let Some(kept) = record.kept else { continue };
        let disk = DiskFile::open(&path.with_file_name(&kept.file), true)?;
        match record.digest {
            Some(digest) if Digest::of(&disk)? == digest => {}
            Some(_) => bail!("the kept disk {} has another digest", kept.file),
            None => bail!("the kept disk {} has no digest", kept.file),
        }
    }
    Ok(())
}
