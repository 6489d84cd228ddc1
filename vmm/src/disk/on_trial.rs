//! The engine of a disk on trial: threads as long as it lasts, and then the engine that the disk has otherwise.
//!
//! In: operations. Out: completions, and an event for each. Holds: which of the two takes an operation makes no difference to what it
//! does, so none has to be waited for when the trial ends.

use super::threads::Threads;
use super::trial::Trial;
use devices::virtio::{Completion, DiskEngine, Operation};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Both engines, which tell of what they have done by one event.
pub(super) struct OnTrial {
    pub(super) trial: Arc<Trial>,
    pub(super) meanwhile: Threads,
    pub(super) afterwards: Box<dyn DiskEngine>,
}

impl DiskEngine for OnTrial {
    fn size(&self) -> u64 {
        self.afterwards.size()
    }

    fn submit(&mut self, token: u16, operation: &Operation) {
        match self.trial.is_over() {
            true => self.afterwards.submit(token, operation),
            false => self.meanwhile.submit(token, operation),
        }
    }

    fn start(&mut self) {
        self.afterwards.start();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.afterwards.event()
    }

    /// The event is read by the first, so nothing that the second has done since is missed.
    fn completed(&mut self) -> Vec<Completion> {
        let mut done = self.afterwards.completed();
        done.append(&mut self.meanwhile.done());
        done
    }
}
