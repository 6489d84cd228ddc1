//! Writing RAM into a planned file.
//!
//! In: a source of RAM, a file. Out: a digest for each chunk. Holds: every chunk is read once; a few threads have one each at hand, and what they are
//! ahead of the disk has a bound.
//!
//! ```text
//! chunks ──► worker: read, digest, write ──┐  at most AHEAD chunks
//!      └───► worker: read, digest, write ──┴──────────────────────► here: note the digests; sync every SYNC bytes
//! ```
//!
//! The disk is at work from early on, rather than from the last sync on. RAM that is not worth it is written by the calling thread alone.

use crate::writer::{ChunkContent, RamSource};
use crate::{CHUNK_SIZE, RamRange, chunk};
use snapshot_format::MappedRange;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Bytes that are written before the disk is asked for them.
const SYNC: u64 = 8 << 20;
/// Chunks that may be done and not yet noted.
const AHEAD: usize = 64;
/// Most threads: more would only be in each other's way to the disk.
const WORKERS_MAX: usize = 4;

/// What became of RAM.
#[derive(Default)]
pub(crate) struct Written {
    /// Of every chunk, in order.
    pub(crate) digests: Vec<u64>,
    /// Bytes in pages that are not all zero.
    pub(crate) data_bytes: u64,
}

/// Why it was given up.
pub(crate) enum RamFailure {
    Read { gpa: u64, source: io::Error },
    Write(io::Error),
}

/// Writes all of RAM where the plan has it; `progress` hears, after each chunk, how many bytes are done and how many there are.
pub(crate) fn write(
    file: &File,
    plan: &[MappedRange],
    source: &dyn RamSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, RamFailure> {
    let worker = || Worker { file, source, buf: vec![0; CHUNK_SIZE as usize] };
    let total = plan.iter().map(|mapped| mapped.range.len).sum();
    let mut notes = Notes { written: Written::default(), done: 0, unsynced: 0, total, file, progress };
    if total < SYNC {
        let mut worker = worker();
        jobs(plan).try_for_each(|job| notes.add(worker.write(&job)?))?;
        return Ok(notes.written);
    }
    let jobs = Mutex::new(jobs(plan));
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        let (sender, done) = sync_channel(AHEAD);
        for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX) {
            let (sender, mut worker) = (sender.clone(), worker());
            let work = move || worker.work(&next, &sender);
            thread::Builder::new().spawn_scoped(scope, work).map_err(RamFailure::Write)?;
        }
        drop(sender);
        // Leaving early closes the channel, which ends the workers.
        done.into_iter().try_for_each(|done| notes.add(done?))
    })?;
    Ok(notes.written)
}

/// A chunk, and where it goes.
struct Job {
    /// Its number.
    index: usize,
    chunk: RamRange,
    offset: u64,
}

/// All chunks in order.
fn jobs(plan: &[MappedRange]) -> impl Iterator<Item = Job> + Send + '_ {
    let chunks = plan.iter().flat_map(|mapped| {
        let offset = |chunk: &RamRange| mapped.offset + (chunk.gpa - mapped.range.gpa);
        chunk::chunks(std::slice::from_ref(&mapped.range)).map(move |chunk| (offset(&chunk), chunk))
    });
    chunks.enumerate().map(|(index, (offset, chunk))| Job { index, chunk, offset })
}

/// A chunk that is in the file.
struct Done {
    index: usize,
    digest: u64,
    len: u64,
    data_bytes: u64,
}

/// What is done so far.
struct Notes<'a> {
    written: Written,
    /// Bytes of chunks, zero or not.
    done: u64,
    /// Bytes since the last sync.
    unsynced: u64,
    total: u64,
    file: &'a File,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Notes<'_> {
    fn add(&mut self, done: Done) -> Result<(), RamFailure> {
        let Written { digests, data_bytes } = &mut self.written;
        digests.resize(digests.len().max(done.index + 1), 0);
        digests[done.index] = done.digest;
        *data_bytes += done.data_bytes;
        self.done += done.len;
        (self.progress)(self.done, self.total);
        self.unsynced += done.data_bytes;
        if self.unsynced >= SYNC {
            self.unsynced = 0;
            self.file.sync_data().map_err(RamFailure::Write)?;
        }
        Ok(())
    }
}

/// Carries chunks over, one at a time.
struct Worker<'a> {
    file: &'a File,
    source: &'a dyn RamSource,
    buf: Vec<u8>,
}

impl Worker<'_> {
    /// Until there are no more, or nobody wants them.
    fn work(&mut self, next: &dyn Fn() -> Option<Job>, done: &SyncSender<Result<Done, RamFailure>>) {
        while let Some(job) = next() {
            if done.send(self.write(&job)).is_err() {
                return;
            }
        }
    }

    /// Writes what is not zero.
    fn write(&mut self, job: &Job) -> Result<Done, RamFailure> {
        let (index, RamRange { gpa, len }) = (job.index, job.chunk);
        let buf = &mut self.buf[..len as usize];
        let read = self.source.read_chunk(gpa, buf);
        if read.map_err(|source| RamFailure::Read { gpa, source })? == ChunkContent::Zero {
            return Ok(Done { index, digest: chunk::zero_digest(len), len, data_bytes: 0 });
        }
        let data_bytes = write_data(self.file, buf, job.offset).map_err(RamFailure::Write)?;
        Ok(Done { index, digest: chunk::digest(buf), len, data_bytes })
    }
}

/// Writes the pages that are not all zero; returns how many bytes that is.
fn write_data(file: &File, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let mut written = 0;
    for run in chunk::data_runs(bytes) {
        file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        written += run.len() as u64;
    }
    Ok(written)
}
