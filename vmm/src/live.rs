//! Live snapshots: a file that is written behind a guest that runs on.
//!
//! In: a machine as of one instant. Out: its snapshot, some time later, and a word to who asked for it. Holds: at most one is under way;
//! one that is cancelled leaves no file and no process behind.
//!
//! Afterwards the huge pages that were split meanwhile are put together again, so that the next one stops the guest for no longer.

use crate::save::{Frozen, SaveError};
use snapshot::Summary;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// A snapshot under way.
#[derive(Debug)]
pub struct LiveSnapshot {
    path: PathBuf,
    cancelled: Arc<AtomicBool>,
    written: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl LiveSnapshot {
    /// Begins to write it; `progress` hears how far it is, as in [`snapshot::write`], and `done` how that ended.
    ///
    /// # Errors
    /// The host has no thread to give. Nobody is told then but the caller.
    pub fn begin(
        frozen: Frozen,
        path: &Path,
        mut progress: impl FnMut(u64, u64) + Send + 'static,
        done: impl FnOnce(Result<Summary, SaveError>) + Send + 'static,
    ) -> io::Result<Self> {
        let [cancelled, written] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let (stop, mark) = (cancelled.clone(), written.clone());
        let write = move || {
            let ram = frozen.running_ram();
            let result = frozen.write(&stop, &mut progress);
            mark.store(true, Ordering::SeqCst);
            done(result);
            ram.rejoin(&|| !stop.load(Ordering::SeqCst));
        };
        let thread = Builder::new().name("live snapshot".to_owned()).spawn(write)?;
        Ok(Self { path: path.to_owned(), cancelled, written, thread })
    }

    /// The file that it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is whole, or has been given up.
    pub fn is_done(&self) -> bool {
        self.written.load(Ordering::SeqCst) || self.thread.is_finished()
    }

    /// Gives it up, unless it is whole by now, and waits until nothing goes on any more.
    pub fn cancel(self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // What a thread that panicked has left goes as its parts are dropped.
        let _ = self.thread.join();
    }
}
