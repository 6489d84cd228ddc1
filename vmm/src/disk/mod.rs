//! Disks: files and block devices of the host, and how a guest's requests get there.
//!
//! In: a path and how it is to be used. Out: a [`DiskFile`] that no other VM writes, and an engine that moves bytes straight
//! between it and guest RAM. Holds: what is no plain run of sectors is refused before anything runs.

mod file;
mod job;
mod keep;
mod on_trial;
mod record;
mod sectors;
mod stamp;
mod stand_in;
mod sync;
mod threads;
mod trial;
mod uring;
mod wish;

pub use file::{DiskError, DiskFile};
pub(crate) use keep::write_data;
pub use keep::{KeepError, KeptDisk};
pub(crate) use keep::{Unclaimed, is_same_file};
pub use record::{DiskCare, DiskRecord, DisksError, RecordError, open};
pub(crate) use record::{check, record, remove_kept};
pub use stamp::{Digest, Stamp};
pub use sync::sync;
pub use trial::{Held, Trial};
pub use wish::{DiskPlace, DiskWish, DiskWishError, WishError};

use devices::Memory;
use on_trial::OnTrial;
use threads::{Place, THREADS, Threads};

use devices::virtio::DiskEngine;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// How requests get to the host's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// io_uring where this host has it, threads otherwise.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Threads that block.
    Threads,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "asynchronous",
            Self::Uring => "io_uring",
            Self::Threads => "threads",
        })
    }
}

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What its owner calls it: the id of its device.
    pub id: String,
    /// What is behind it.
    pub file: DiskFile,
    /// How requests get there.
    pub engine: EngineChoice,
}

/// An engine for the disk, over this RAM.
///
/// # Errors
/// The host has not what was chosen: io_uring may be absent, or switched off by `kernel.io_uring_disabled` or a filter of
/// system calls.
pub fn engine(disk: &DiskFile, memory: &Memory, choice: EngineChoice) -> io::Result<Box<dyn DiskEngine>> {
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let Some(trial) = disk.trial.clone() else { return direct(disk, memory, choice, event) };
    let (place, memory_of_it) = (Place::Trial(trial.clone()), memory.clone());
    let meanwhile = Threads::new(THREADS, place, disk.size, memory_of_it, event.clone())?;
    let afterwards = direct(disk, memory, choice, event)?;
    Ok(Box::new(OnTrial { trial, meanwhile, afterwards }))
}

fn direct(
    disk: &DiskFile,
    memory: &Memory,
    choice: EngineChoice,
    event: Arc<EventFd>,
) -> io::Result<Box<dyn DiskEngine>> {
    let (file, size, memory) = (disk.file.clone(), disk.size, memory.clone());
    if choice != EngineChoice::Threads {
        match uring::Uring::new(file.clone(), size, memory.clone(), event.clone()) {
            Ok(uring) => return Ok(Box::new(uring)),
            Err(error) if choice == EngineChoice::Uring => return Err(error),
            Err(_) => {}
        }
    }
    Ok(Box::new(Threads::new(THREADS, Place::File(file), size, memory, event)?))
}

#[cfg(test)]
mod tests;
