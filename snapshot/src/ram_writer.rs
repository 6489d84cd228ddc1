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

use crate::writer::{ChunkContent, Contents, RamSource, WriteError};
use crate::{CHUNK_SIZE, PAGE_SIZE, PageSet, RamRange, chunk};
use snapshot_format::MappedRange;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Bytes that are written before the disk is asked for them.
const SYNC: u64 = 64 << 20;
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
    /// Bytes of RAM.
    pub(crate) ram_bytes: u64,
}

/// Why it was given up.
pub(crate) enum RamFailure {
    Read { gpa: u64, source: io::Error },
    Write(io::Error),
}

impl RamFailure {
    pub(crate) fn at(self, path: &Path) -> WriteError {
        match self {
            Self::Read { gpa, source } => WriteError::Ram { gpa, source },
            Self::Write(source) => WriteError::Write { path: path.to_owned(), source },
        }
    }
}

/// Writes all of RAM where the plan has it; `progress` hears, after each chunk, how many bytes are done and how many there are.
pub(crate) fn write(
    file: &File,
    plan: &[MappedRange],
    contents: &Contents,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, RamFailure> {
    let worker = || Worker::new(file, contents.ram, contents.delta.map(|delta| &delta.changed));
    let total = plan.iter().map(|mapped| mapped.range.len).sum();
    let mut notes = Notes { written: Written::default(), unsynced: 0, total, file, progress };
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
    /// The number of its first page.
    first_page: u64,
}

/// All chunks in order.
fn jobs(plan: &[MappedRange]) -> impl Iterator<Item = Job> + Send + '_ {
    let chunks = plan.iter().flat_map(|mapped| {
        let offset = |chunk: &RamRange| mapped.offset + (chunk.gpa - mapped.range.gpa);
        chunk::chunks(std::slice::from_ref(&mapped.range)).map(move |chunk| (offset(&chunk), chunk))
    });
    let mut pages = 0;
    chunks.enumerate().map(move |(index, (offset, chunk))| {
        let first_page = pages;
        pages += chunk.len / PAGE_SIZE;
        Job { index, chunk, offset, first_page }
    })
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
    /// Bytes since the last sync.
    unsynced: u64,
    total: u64,
    file: &'a File,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Notes<'_> {
    fn add(&mut self, done: Done) -> Result<(), RamFailure> {
        let Written { digests, data_bytes, ram_bytes } = &mut self.written;
        digests.resize(digests.len().max(done.index + 1), 0);
        digests[done.index] = done.digest;
        *data_bytes += done.data_bytes;
        *ram_bytes += done.len;
        (self.progress)(*ram_bytes, self.total);
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
    changed: Option<&'a PageSet>,
    /// All zero between the chunks of an incremental snapshot.
    buf: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(file: &'a File, source: &'a dyn RamSource, changed: Option<&'a PageSet>) -> Self {
        Self { file, source, changed, buf: vec![0; CHUNK_SIZE as usize] }
    }

    /// Until there are no more, or nobody wants them.
    fn work(&mut self, next: &dyn Fn() -> Option<Job>, done: &SyncSender<Result<Done, RamFailure>>) {
        while let Some(job) = next() {
            if done.send(self.write(&job)).is_err() {
                return;
            }
        }
    }

    fn write(&mut self, job: &Job) -> Result<Done, RamFailure> {
        let (digest, data_bytes) = match self.changed {
            None => self.write_whole(job)?,
            Some(changed) => self.write_changed(job, changed)?,
        };
        Ok(Done { index: job.index, digest, len: job.chunk.len, data_bytes })
    }

    /// Writes what is not zero; returns the digest, and the bytes that were written.
    fn write_whole(&mut self, job: &Job) -> Result<(u64, u64), RamFailure> {
        let buf = &mut self.buf[..job.chunk.len as usize];
        let read = self.source.read_chunk(job.chunk.gpa, buf);
        if read.map_err(|source| RamFailure::Read { gpa: job.chunk.gpa, source })? == ChunkContent::Zero {
            return Ok((chunk::zero_digest(job.chunk.len), 0));
        }
        let written = write_data(self.file, buf, job.offset).map_err(RamFailure::Write)?;
        Ok((chunk::digest(buf), written))
    }

    /// The same of the pages that changed; the others count as zero.
    fn write_changed(&mut self, job: &Job, changed: &PageSet) -> Result<(u64, u64), RamFailure> {
        let pages = job.first_page..job.first_page + job.chunk.len / PAGE_SIZE;
        let place = |run: Range<u64>| {
            let [start, end] = [run.start, run.end].map(|page| (page - job.first_page) * PAGE_SIZE);
            start as usize..end as usize
        };
        let runs: Vec<_> = changed.runs(pages).map(place).collect();
        if runs.is_empty() {
            return Ok((chunk::zero_digest(job.chunk.len), 0));
        }
        let buf = &mut self.buf[..job.chunk.len as usize];
        let mut written = 0;
        for run in &runs {
            let (gpa, part) = (job.chunk.gpa + run.start as u64, &mut buf[run.clone()]);
            self.source.read_pages(gpa, part).map_err(|source| RamFailure::Read { gpa, source })?;
            written +=
                write_data(self.file, part, job.offset + run.start as u64).map_err(RamFailure::Write)?;
        }
        let digest = chunk::digest(buf);
        runs.into_iter().for_each(|run| buf[run].fill(0));
        Ok((digest, written))
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
