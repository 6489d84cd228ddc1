//! Control groups, by which all of a container stands still at once.
//!
//! In: a group's name. Out: a group in the unified hierarchy (cgroup v2), frozen or not. Holds: a frozen process notices nothing,
//! unlike one that is stopped by a signal.
//!
//! Source: Linux `Documentation/admin-guide/cgroup-v2.rst`.

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const HIERARCHY: &str = "/sys/fs/cgroup";
/// A process in the middle of a system call that waits for a disk stands still when that is done.
const LIMIT: Duration = Duration::from_secs(10);

/// A control group, which may not be there yet.
pub(crate) struct Group {
    pub(crate) path: PathBuf,
}

/// The workload's.
pub(crate) fn workload() -> Group {
    Group::of("vmm-workload")
}

impl Group {
    fn of(name: &str) -> Group {
        Group { path: Path::new(HIERARCHY).join(name) }
    }

    /// Makes the group unless it is there, and returns what a process writes `0` to that wants to be in it.
    pub(crate) fn entrance(&self) -> Result<File> {
        if !Path::new(HIERARCHY).join("cgroup.procs").exists() {
            mount("cgroup2", HIERARCHY, "cgroup2", MountFlags::empty(), None)
                .with_context(|| format!("cannot mount {HIERARCHY}"))?;
        }
        if !self.path.is_dir() {
            fs::create_dir(&self.path).with_context(|| format!("cannot make {}", self.path.display()))?;
        }
        let procs = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))
    }

    /// Its processes.
    pub(crate) fn members(&self) -> Vec<i32> {
        let members = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        members.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Returns when all of it stands still.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.set("cgroup.freeze", "1")?;
        let deadline = Instant::now() + LIMIT;
        while !self.is_frozen() {
            if Instant::now() > deadline {
                bail!("the processes do not stand still within {} s", LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Does nothing if there is no group.
    pub(crate) fn thaw(&self) -> Result<()> {
        if self.path.is_dir() { self.set("cgroup.freeze", "0") } else { Ok(()) }
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let file = self.path.join(file);
        fs::write(&file, value).with_context(|| format!("cannot write {}", file.display()))
    }

    pub(crate) fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.path.join("cgroup.events"));
        events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
    }
}
