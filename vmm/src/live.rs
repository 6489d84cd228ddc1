//! Live snapshots: a file that is written behind a guest that runs on.
//!
//! In: a machine as of one instant. Out: its snapshot, some time later, and a word to who asked for it. Holds: at most one is under way;
//! one that is cancelled leaves no file and no process behind.
//!
//! Afterwards the huge pages that were split meanwhile are put together again, so that the next one stops the guest for no longer.

use crate::copy_ahead::{AheadError, CopiedAhead, Plan};
use crate::save::{Frozen, SaveError};
use snapshot::Summary;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use vmm_sys_util::eventfd::EventFd;

/// A machine of which all but the last of its RAM is being copied, while it runs. Dropped, that is given up.
#[derive(Debug)]
pub struct GettingReady {
    cancelled: Arc<AtomicBool>,
    copied: Arc<Copied>,
    event: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// None until it is done.
type Copied = Mutex<Option<Result<CopiedAhead, AheadError>>>;

fn locked(copied: &Copied) -> MutexGuard<'_, Option<Result<CopiedAhead, AheadError>>> {
    copied.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GettingReady {
    /// Begins; `between` as in [`Plan::copy`].
    ///
    /// # Errors
    /// The host has no thread or event to give.
    pub fn begin(plan: Plan, between: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (cancelled, copied) = (Arc::new(AtomicBool::new(false)), Arc::new(Copied::default()));
        let (stop, result, told) = (cancelled.clone(), copied.clone(), event.clone());
        let copy = move || {
            let copied = plan.copy(&|| !stop.load(Ordering::SeqCst), between);
            *locked(&result) = Some(copied);
            // It fails only when nobody has read 2^64 of them.
            let _ = told.write(1);
        };
        let thread = Some(Builder::new().name("copy ahead".to_owned()).spawn(copy)?);
        Ok(Self { cancelled, copied, event, thread })
    }

    /// Becomes readable when it is done.
    pub fn event(&self) -> Arc<EventFd> {
        self.event.clone()
    }

    /// Whether it is done, or has failed.
    pub fn is_done(&self) -> bool {
        locked(&self.copied).is_some()
    }

    /// What there is, once it is done.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub fn finish(self) -> Result<CopiedAhead, AheadError> {
        locked(&self.copied).take().unwrap_or(Err(AheadError::Cancelled))
    }
}

impl Drop for GettingReady {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // What a thread that panicked has left goes as its parts are dropped.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

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
