//! A disk on io_uring: reads, writes and flushes go to the kernel in batches, without a thread of ours.
//!
//! In: operations. Out: completions, and an event for each. Holds: what the kernel works on stays where it is until the
//! kernel has said that it is done; dropping it waits for that.
//!
//! Discards and zeroes are rare, slow, and may need a substitute, so a thread does them.

use super::job::{Job, Transfer, Work};
use super::threads::{Place, Threads, event_fd};
use devices::Memory;
use devices::virtio::{Completion, DiskEngine, Operation};
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Entries of the ring, and so the most operations in the kernel: as many as a device's queue has.
const ENTRIES: u32 = 256;

/// A ring over one file.
pub(super) struct Uring {
    ring: IoUring,
    file: Arc<File>,
    /// By token: what the kernel has.
    jobs: Vec<Option<Box<Job>>>,
    /// What failed before it reached the kernel.
    failed: Vec<Completion>,
    slow: Threads,
    event: Arc<EventFd>,
    memory: Memory,
}

impl Uring {
    /// # Errors
    /// The host has no io_uring, or not for this process.
    pub(super) fn new(file: Arc<File>, size: u64, memory: Memory, event: Arc<EventFd>) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let slow = Threads::new(1, Place::File(file.clone()), size, memory.clone(), event.clone())?;
        let jobs = (0..ENTRIES).map(|_| None).collect();
        Ok(Self { ring, file, jobs, failed: Vec::new(), slow, event, memory })
    }

    /// Keeps the job and puts it into the submission queue.
    fn enqueue(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = match &job.work {
            Work::Transfer(transfer) => transfer_entry(fd, transfer),
            Work::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Space(_) => return Err(job),
        };
        let entry = entry.user_data(u64::from(job.token));
        // SAFETY: the vectors that the entry names are in a boxed job, which `self.jobs` keeps until its completion is
        // seen; they name guest RAM that the job keeps mapped; the file is open as long as `self`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            return Err(job);
        }
        let token = usize::from(job.token);
        self.jobs[token] = Some(job);
        Ok(())
    }

    /// Gives the kernel what is queued. If it has no room now it is asked again when the event is next heard, which is at
    /// once.
    fn give(&mut self) {
        while let Err(error) = self.ring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                let _ = self.event.write(1);
                return;
            }
        }
    }

    fn reap(&mut self) -> Vec<Completion> {
        let entries: Vec<_> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        let mut done = Vec::new();
        for (token, result) in entries {
            let Some(mut job) = self.jobs.get_mut(token as usize).and_then(Option::take) else { continue };
            match settle(&mut job, result) {
                Ok(true) => done.push(Completion { token: job.token, result: Ok(()) }),
                Ok(false) => done.extend(self.try_enqueue(job)),
                Err(error) => done.push(Completion { token: job.token, result: Err(error) }),
            }
        }
        done
    }

    fn try_enqueue(&mut self, job: Box<Job>) -> Option<Completion> {
        let refused = self.enqueue(job).err()?;
        let error = io::Error::other("the ring has no room");
        Some(Completion { token: refused.token, result: Err(error) })
    }

    fn in_kernel(&self) -> bool {
        self.jobs.iter().any(Option::is_some)
    }
}

fn transfer_entry(fd: types::Fd, transfer: &Transfer) -> squeue::Entry {
    let (vectors, offset) = (transfer.vectors(), transfer.offset);
    let (first, count) = (vectors.as_ptr(), vectors.len() as u32);
    match transfer.write {
        true => opcode::Writev::new(fd, first, count).offset(offset).build(),
        false => opcode::Readv::new(fd, first, count).offset(offset).build(),
    }
}

/// Whether the job is done, or has to go to the kernel again.
fn settle(job: &mut Job, result: i32) -> io::Result<bool> {
    if result < 0 {
        let again = matches!(-result, libc::EINTR | libc::EAGAIN);
        return if again { Ok(false) } else { Err(io::Error::from_raw_os_error(-result)) };
    }
    let Work::Transfer(transfer) = &mut job.work else { return Ok(true) };
    transfer.advance(result as usize)?;
    Ok(transfer.is_done())
}

impl DiskEngine for Uring {
    fn size(&self) -> u64 {
        self.slow.size()
    }

    fn submit(&mut self, token: u16, operation: &Operation) {
        let failed = match Job::new(token, operation, &self.memory) {
            Ok(job @ Job { work: Work::Space(_), .. }) => {
                self.slow.push(job);
                None
            }
            Ok(job) => self.try_enqueue(Box::new(job)),
            Err(error) => Some(Completion { token, result: Err(error) }),
        };
        if let Some(failed) = failed {
            self.failed.push(failed);
            let _ = self.event.write(1);
        }
    }

    fn start(&mut self) {
        if !self.ring.submission().is_empty() {
            self.give();
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        event_fd(&self.event)
    }

    /// The event is read first: what is done after that announces itself anew.
    fn completed(&mut self) -> Vec<Completion> {
        let mut done = self.slow.completed();
        done.append(&mut self.failed);
        done.extend(self.reap());
        self.start();
        done
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_kernel() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => drop(self.reap()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel may still write to guest RAM: it and the vectors must stay.
                Err(_) => return std::mem::forget(std::mem::take(&mut self.jobs)),
            }
        }
    }
}
