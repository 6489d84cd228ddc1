//! Labs of one process take turns.
//!
//! In: a lab that wants to run. Out: its turn, until dropped. Holds: no more labs run at once than the host can carry, one
//! for every core, since a lab's guests wait much of the time; so tests in parallel threads don't starve each other into their
//! limits.

use std::sync::{Condvar, Mutex, PoisonError};

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// Leave to run a lab.
#[derive(Debug)]
pub(super) struct Turn;

impl Turn {
    pub(super) fn wait() -> Turn {
        let most = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let running = ENDED.wait_while(running, |running| *running >= most);
        *running.unwrap_or_else(PoisonError::into_inner) += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}
