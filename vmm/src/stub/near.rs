//! Hints: what the stub is about to touch, the host maps at once.
//!
//! In: hints, each about a part of a slot. Out: pages that are there for this process and for the vCPU. Holds: nothing depends on a
//! hint, and one beyond a slot is none; no byte is looked at or changed; the thread that gets RAM ends before the slots do.
//!
//! Fresh pages of RAM take longer than what the stub does with them, so another thread gets those of the next chunk meanwhile.

use crate::kvm;
use kvm_ioctls::VcpuFd;
use restore_stub::abi;
use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

/// Hints about RAM that may be waiting. The stub has no more than two.
const AHEAD_MAX: usize = 4;
const PAGE: u64 = crate::layout::PAGE_SIZE;

/// Memory that the stub sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) gpa: u64,
    /// Bytes.
    pub(super) len: u64,
    /// In this process.
    pub(super) host: u64,
}

/// Pages next to one another: of the guest, of this process, and how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    gpa: u64,
    host: u64,
    len: u64,
}

/// What can be hinted at.
pub(super) struct Near {
    /// Whether KVM maps pages for a vCPU that has not touched them.
    pre_fault: bool,
    /// The file.
    image: Option<Slot>,
    /// RAM.
    slots: Vec<Slot>,
    helper: Option<Helper>,
    /// What the helper is at, and what it will do after that.
    ahead: VecDeque<Vec<Run>>,
}

/// A thread that gets pages.
struct Helper {
    jobs: Option<Sender<Vec<Run>>>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Near {
    /// With the file, if it has bytes. It is there for as long as this is.
    pub(super) fn new(pre_fault: bool, image: Option<Slot>) -> Self {
        let alone = thread::available_parallelism().is_ok_and(|count| count == NonZero::<usize>::MIN);
        let helper = if alone { None } else { Helper::start() };
        Self { pre_fault, image, slots: Vec::new(), helper, ahead: VecDeque::new() }
    }

    /// A slot that is there for as long as this is.
    pub(super) fn add(&mut self, slot: Slot) {
        self.slots.push(slot);
    }

    /// The stub is about to read this part of the file. Says whether that will take it no exits.
    pub(super) fn image(&self, vcpu: &VcpuFd, start: u64, len: u64) -> bool {
        let slot = self.image.filter(|_| self.pre_fault);
        let run = slot.and_then(|slot| slot.run(slot.gpa.saturating_add(start), len));
        run.is_some_and(|run| {
            get(&run, libc::MADV_POPULATE_READ);
            kvm::pre_fault(vcpu, run.gpa, run.len).is_ok()
        })
    }

    /// The stub will write these pages of RAM, a bit for each from `start` on.
    pub(super) fn ram(&mut self, start: u64, pages: [u64; abi::NEAR_PAGES_LEN]) {
        if self.ahead.len() == AHEAD_MAX {
            return;
        }
        let slot = |gpa, len| self.slots.iter().find_map(|slot| slot.run(gpa, len));
        let runs: Vec<_> = runs(pages)
            .filter_map(|(first, count)| slot(start.saturating_add(first * PAGE), count * PAGE))
            .collect();
        match self.helper.as_ref().and_then(|helper| helper.jobs.as_ref()) {
            Some(jobs) => drop(jobs.send(runs.clone())),
            None => runs.iter().for_each(get_ram),
        }
        self.ahead.push_back(runs);
    }

    /// The stub is about to write what it hinted at first.
    pub(super) fn now(&mut self, vcpu: &VcpuFd) {
        let Some(runs) = self.ahead.pop_front() else { return };
        if let Some(helper) = &self.helper {
            let _ = helper.done.recv();
        }
        for run in runs.iter().filter(|_| self.pre_fault) {
            let _ = kvm::pre_fault(vcpu, run.gpa, run.len);
        }
    }
}

impl Slot {
    /// A part of it, if it has that part.
    fn run(&self, gpa: u64, len: u64) -> Option<Run> {
        let within = gpa >= self.gpa && len <= self.len && gpa - self.gpa <= self.len - len;
        within.then(|| Run { gpa, host: self.host + (gpa - self.gpa), len })
    }
}

impl Helper {
    fn start() -> Option<Self> {
        let (jobs, waiting) = channel::<Vec<Run>>();
        let (done, finished) = channel();
        let work = move || {
            for runs in waiting {
                runs.iter().for_each(get_ram);
                if done.send(()).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("stub pages".to_owned()).spawn(work).ok()?;
        Some(Self { jobs: Some(jobs), done: finished, thread: Some(thread) })
    }
}

impl Drop for Helper {
    /// The pages are the caller's, who may unmap them next.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn get_ram(run: &Run) {
    get(run, libc::MADV_POPULATE_WRITE);
}

fn get(run: &Run, advice: i32) {
    // SAFETY: the range is within a mapping that outlives `Near`, and with it the thread; the call changes no byte of it.
    unsafe { libc::madvise(run.host as *mut libc::c_void, run.len as usize, advice) };
}

/// Runs of bits that are set: the first, and how many.
fn runs(pages: [u64; abi::NEAR_PAGES_LEN]) -> impl Iterator<Item = (u64, u64)> {
    let is_set = move |page: u64| pages[(page / 64) as usize] >> (page % 64) & 1 == 1;
    let end = 64 * abi::NEAR_PAGES_LEN as u64;
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = (at..end).find(|page| is_set(*page))?;
        at = (first..end).find(|page| !is_set(*page)).unwrap_or(end);
        Some((first, at - first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_runs() {
        let mut pages = [0; abi::NEAR_PAGES_LEN];
        assert_eq!(runs(pages).count(), 0);
        pages[0] = 0b0110 | 1 << 63;
        pages[1] = 1;
        pages[3] = 1 << 63;
        assert_eq!(runs(pages).collect::<Vec<_>>(), [(1, 2), (63, 2), (255, 1)]);
        assert_eq!(runs([u64::MAX; abi::NEAR_PAGES_LEN]).collect::<Vec<_>>(), [(0, 256)]);
    }

    #[test]
    fn a_hint_beyond_a_slot_is_none() {
        let slot = Slot { gpa: 0x1000, len: 0x3000, host: 0x7000 };
        assert_eq!(slot.run(0x2000, 0x2000), Some(Run { gpa: 0x2000, host: 0x8000, len: 0x2000 }));
        for (gpa, len) in [(0, 0x1000), (0x2000, 0x3000), (0x4000, 0x1000), (u64::MAX, 0x1000)] {
            assert_eq!(slot.run(gpa, len), None, "{gpa:#x} {len:#x}");
        }
    }

    #[test]
    fn no_more_hints_wait_than_the_stub_has() {
        let mut near = Near::new(false, None);
        for _ in 0..AHEAD_MAX + 3 {
            near.ram(0, [u64::MAX; abi::NEAR_PAGES_LEN]);
        }
        assert_eq!(near.ahead.len(), AHEAD_MAX);
    }
}
