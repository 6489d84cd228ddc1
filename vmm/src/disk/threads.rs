//! A disk that threads work on, with calls that block.
//!
//! In: operations. Out: completions, and an event for each. Holds: dropping it waits for what has begun and forgets the rest.

use super::job::Job;
use super::trial::Trial;
use devices::Memory;
use devices::virtio::{Completion, DiskEngine, Operation};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use vmm_sys_util::eventfd::EventFd;

/// How many operations are under way in the host at once.
pub(super) const THREADS: usize = 4;

/// A pool of threads over one disk.
pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    memory: Memory,
    size: u64,
}

/// Where the bytes are.
pub(super) enum Place {
    File(Arc<File>),
    Trial(Arc<Trial>),
}

impl Place {
    fn run(&self, job: &mut Job) -> io::Result<()> {
        match self {
            Self::File(file) => job.run(file),
            Self::Trial(trial) => trial.run(job),
        }
    }
}

struct Shared {
    place: Place,
    queue: Mutex<Queue>,
    /// Told when there is a job, or the end.
    changed: Condvar,
    event: Arc<EventFd>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    done: Vec<Completion>,
    ending: bool,
}

impl Threads {
    /// So many threads, that write to `event` when something is done.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub(super) fn new(
        count: usize,
        place: Place,
        size: u64,
        memory: Memory,
        event: Arc<EventFd>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { place, queue: Mutex::default(), changed: Condvar::new(), event });
        let mut threads = Self { shared, threads: Vec::new(), memory, size };
        for _ in 0..count {
            let shared = threads.shared.clone();
            threads.threads.push(Builder::new().name("disk".to_owned()).spawn(move || shared.work())?);
        }
        Ok(threads)
    }

    /// What is done, without a look at the event.
    pub(super) fn done(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.shared.queue().done)
    }

    pub(super) fn push(&mut self, job: Job) {
        self.shared.queue().jobs.push_back(job);
        self.shared.changed.notify_one();
    }
}

impl Shared {
    /// What a panicking thread leaves is whole: no step below leaves a queue half changed.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(mut job) = self.next() {
            let (token, result) = (job.token, self.place.run(&mut job));
            // What it read is marked as written before anybody hears that it is done.
            drop(job);
            self.done(token, result);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if queue.ending {
                return None;
            }
            match queue.jobs.pop_front() {
                Some(job) => return Some(job),
                None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn done(&self, token: u16, result: io::Result<()>) {
        self.queue().done.push(Completion { token, result });
        // It fails only when nobody has read 2^64 of them.
        let _ = self.event.write(1);
    }
}

impl DiskEngine for Threads {
    fn size(&self) -> u64 {
        self.size
    }

    fn submit(&mut self, token: u16, operation: &Operation) {
        match Job::new(token, operation, &self.memory) {
            Ok(job) => self.push(job),
            Err(error) => self.shared.done(token, Err(error)),
        }
    }

    fn start(&mut self) {}

    fn event(&self) -> BorrowedFd<'_> {
        event_fd(&self.shared.event)
    }

    fn completed(&mut self) -> Vec<Completion> {
        let _ = self.shared.event.read();
        self.done()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.queue().ending = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

pub(super) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
