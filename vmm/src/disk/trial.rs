//! A disk on trial: what is written to it lies beside it, until it is certain that it is to be.
//!
//! In: a disk's jobs. Out: the bytes that would be there. Holds: the disk itself is not written before [`Held::apply`], so whoever had it
//! before finds it as it was; whatever the outcome, the one on trial sees what it wrote.
//!
//! A flush is answered at once: if the host loses its power, there was no trial. Discards are not done.

use super::DiskFile;
use super::job::{Job, Transfer, Work, zero};
use super::keep::{directory, nameless};
use super::sectors::Sectors;
use super::stamp::{CHUNK, next_data};
use devices::lock;
use devices::virtio::{Operation, SECTOR};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What is written beside a disk.
#[derive(Debug)]
pub struct Trial {
    disk: Arc<File>,
    size: u64,
    /// As long as the disk, without a name, and full of holes.
    beside: File,
    /// What of it is in place of the disk's own.
    written: Mutex<Sectors>,
    /// Whether it is over, and the disk has it all. Held for reading while a job runs.
    over: RwLock<bool>,
}

/// A trial whose disk nobody works on meanwhile.
#[derive(Debug)]
pub struct Held<'a> {
    trial: &'a Trial,
    over: RwLockWriteGuard<'a, bool>,
}

impl Trial {
    /// Of this disk. What is written lies in the disk's directory, or with the host's temporary files, or in memory: where there is a
    /// place first.
    ///
    /// # Errors
    /// There is none.
    pub fn of(disk: &DiskFile) -> io::Result<Self> {
        let beside = place(disk)?;
        beside.set_len(disk.size)?;
        let (written, over) = (Mutex::default(), RwLock::new(false));
        Ok(Self { disk: disk.file.clone(), size: disk.size, beside, written, over })
    }

    /// Whether the disk has it all.
    pub(super) fn is_over(&self) -> bool {
        *self.working()
    }

    /// Waits for the jobs under way, and has others wait.
    pub fn hold(&self) -> Held<'_> {
        Held { trial: self, over: self.over.write().unwrap_or_else(PoisonError::into_inner) }
    }

    fn working(&self) -> RwLockReadGuard<'_, bool> {
        self.over.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does all of the job, and waits for it.
    pub(super) fn run(&self, job: &mut Job) -> io::Result<()> {
        let over = self.working();
        if *over {
            return job.run(&self.disk);
        }
        match &mut job.work {
            Work::Transfer(transfer) if transfer.write => {
                let (offset, len) = (transfer.offset, transfer.left());
                transfer.run(&self.beside)?;
                self.mark(offset, len);
                Ok(())
            }
            Work::Transfer(transfer) => self.read(transfer),
            Work::Space(Operation::WriteZeroes { offset, len, .. }) => {
                zero(&self.beside, *offset, *len, true)?;
                self.mark(*offset, *len);
                Ok(())
            }
            Work::Sync | Work::Space(_) => Ok(()),
        }
    }

    fn mark(&self, offset: u64, len: u64) {
        lock(&self.written).add(offset / SECTOR, len / SECTOR);
    }

    fn read(&self, transfer: &mut Transfer) -> io::Result<()> {
        while !transfer.is_done() {
            let (first, max) = (transfer.offset / SECTOR, transfer.left() / SECTOR);
            let (count, written) = lock(&self.written).alike(first, max);
            transfer.run_for(if written { &self.beside } else { &self.disk }, count * SECTOR)?;
        }
        Ok(())
    }
}

impl Held<'_> {
    /// Has the disk's file system keep room for all that was written. The disk's bytes stay as they are, though not the times of its file.
    ///
    /// # Errors
    /// There is no room.
    pub fn reserve(&self) -> io::Result<()> {
        // What the host could not write down would be missed now.
        self.trial.beside.sync_data()?;
        self.each_piece(|at, len, is_data| match is_data {
            true => reserve(&self.trial.disk, at, len),
            false => Ok(()),
        })
    }

    /// Writes to the disk what was written beside it, durably. Returns how many bytes. It can be done again.
    ///
    /// # Errors
    /// What the host said; a part may have been written.
    pub fn apply(&self) -> io::Result<u64> {
        let (disk, mut bytes) = (&self.trial.disk, 0);
        let mut buf = vec![0; CHUNK as usize];
        self.each_piece(|at, len, is_data| {
            bytes += len;
            if !is_data {
                return zero(disk, at, len, true);
            }
            let piece = &mut buf[..len as usize];
            self.trial.beside.read_exact_at(piece, at)?;
            disk.write_all_at(piece, at)
        })?;
        disk.sync_data()?;
        Ok(bytes)
    }

    /// What was applied is all there is from now on.
    pub fn finish(mut self) {
        *self.over = true;
    }

    /// Calls `with` for what was written, in order: at most [`CHUNK`] bytes of data at once, or a hole, which is zeroes.
    fn each_piece(&self, mut with: impl FnMut(u64, u64, bool) -> io::Result<()>) -> io::Result<()> {
        let written = lock(&self.trial.written);
        for (first, count) in written.runs() {
            let (mut at, end) = (first * SECTOR, (first + count) * SECTOR);
            while at < end {
                let data = next_data(&self.trial.beside, at, self.trial.size)?.unwrap_or(end).clamp(at, end);
                if data > at {
                    with(at, data - at, false)?;
                }
                let len = (end - data).min(CHUNK);
                if len > 0 {
                    with(data, len, true)?;
                }
                at = data + len;
            }
        }
        Ok(())
    }
}

/// A block device has its room, and not every file system can say what it has.
fn reserve(disk: &File, at: u64, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(disk, FallocateFlags::KEEP_SIZE, at, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NODEV | rustix::io::Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn place(disk: &DiskFile) -> io::Result<File> {
    let is_file = disk.file.metadata()?.is_file();
    let beside = disk.path.as_deref().filter(|_| is_file).map(directory);
    let places = beside.into_iter().chain([std::env::temp_dir()]);
    let in_memory = || Ok(File::from(rustix::fs::memfd_create("trial", MemfdFlags::CLOEXEC)?));
    places
        .map(|place: std::path::PathBuf| nameless(Path::new(&place)))
        .find(Result::is_ok)
        .unwrap_or_else(in_memory)
}

#[cfg(test)]
#[path = "trial_tests.rs"]
mod tests;
