//! How far a snapshot has got.
//!
//! In: bytes of RAM that are done. Out: the same, for whoever asks meanwhile. Holds: to ask waits for nobody, least of all for the machine's loop, which
//! may be busy with that snapshot.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of one snapshot after the other; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    total: AtomicU64,
}

/// What it was at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSoFar {
    /// Bytes of RAM that are read and written. All of them does not mean that the snapshot is whole: it still has to reach the disk.
    pub done_bytes: u64,
    /// Bytes of RAM that the snapshot being written has; 0 if none is.
    pub total_bytes: u64,
}

impl Progress {
    /// So much of so much is done.
    pub fn note(&self, done: u64, total: u64) {
        self.0.done.store(done, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
    }

    /// No snapshot is being written any more.
    pub fn end(&self) {
        self.note(0, 0);
    }

    /// What it is.
    pub fn now(&self) -> SavedSoFar {
        let [done_bytes, total_bytes] =
            [&self.0.done, &self.0.total].map(|count| count.load(Ordering::Relaxed));
        SavedSoFar { done_bytes: done_bytes.min(total_bytes), total_bytes }
    }
}
