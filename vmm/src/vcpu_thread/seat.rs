//! Whose thread a vCPU has: one that is made for it, or the caller's.
//!
//! In: a vCPU with all that it needs. Out: it has its thread. Holds: whoever lets go of a vCPU waits until its thread has let go of it too,
//! and no thread waits for itself.
//!
//! A thread that is made takes 200 to 300 µs to get going where the host is a guest itself, and what KVM is asked meanwhile takes
//! longer. The first vCPU can have the thread that made the machine, which has nothing else to do then.

use super::{Body, State};
use crate::kick_timer::KickTimer;
use crate::soon;
use crate::vcpu::kick_signal;
use rustix::process::getpid;
use rustix::thread::gettid;
use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::signal::Killable;

/// A guest that has run for so long without an exit has run.
const MOMENT: Duration = Duration::from_micros(500);

/// A thread for a vCPU.
pub struct Seat {
    body: Sender<Body>,
    thread: Thread,
}

/// What the thread that [`Seat::here`] was called on has to do for it.
pub struct Place {
    bodies: Receiver<Body>,
    /// Goes when the thread has let go of its vCPU.
    _here: Sender<Infallible>,
}

/// The thread, as those see it who want it to stop.
pub(super) enum Thread {
    Own(Option<JoinHandle<()>>),
    Callers { id: i32, left: Receiver<Infallible> },
}

impl Seat {
    /// Starts a thread for the vCPU of this number. It ends if there is none to come.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn new(index: u32) -> io::Result<Self> {
        let (body, bodies) = channel::<Body>();
        let live = move || {
            if let Ok(body) = soon::recv(&bodies) {
                body.live(|_| State::Paused);
            }
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(live)?;
        Ok(Self { body, thread: Thread::Own(Some(thread)) })
    }

    /// The calling thread, which has to come to the place once the vCPU has been told to run, or not.
    pub fn here() -> (Self, Place) {
        let (body, bodies) = channel();
        let (here, left) = channel();
        let thread = Thread::Callers { id: gettid().as_raw_nonzero().get(), left };
        (Self { body, thread }, Place { bodies, _here: here })
    }

    pub(super) fn take(self, body: Body) -> Thread {
        // It fails only for a thread that has ended before it had a vCPU.
        let _ = self.body.send(body);
        self.thread
    }
}

impl Place {
    /// Is the vCPU's thread for as long as there is the vCPU. `then` is called once: when the guest's first exit has been answered, or it has
    /// run for a moment; or at once, if it is not to run yet. If that fails, the guest runs no further.
    ///
    /// # Errors
    /// Those of `then`.
    pub fn live(self, then: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Ok(body) = self.bodies.recv() else { return then() };
        let (mut then, mut done) = (Some(then), Ok(()));
        let first = |body: &Body| {
            let state = body.first_step(|| KickTimer::start(MOMENT));
            done = then.take().map_or(Ok(()), |then| then());
            if done.is_ok() { state } else { State::Ended }
        };
        // It has been reported by whom it happened to.
        let _ = catch_unwind(AssertUnwindSafe(|| body.live(first)));
        then.map_or(done, |then| then())
    }
}

impl Thread {
    pub(super) fn kick(&self) {
        // It fails only for a thread that has ended.
        match self {
            Self::Own(thread) => drop(thread.as_ref().map(|thread| thread.kill(kick_signal()))),
            Self::Callers { id, .. } => {
                // SAFETY: takes three numbers; a thread that isn't there is not found.
                unsafe { libc::tgkill(getpid().as_raw_nonzero().get(), *id, kick_signal()) };
            }
        }
    }

    /// Until it has let go of its vCPU.
    pub(super) fn wait(&mut self) {
        match self {
            Self::Own(thread) => drop(thread.take().map(JoinHandle::join)),
            Self::Callers { id, .. } if *id == gettid().as_raw_nonzero().get() => {}
            Self::Callers { left, .. } => drop(left.recv()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_without_a_vcpu_lets_the_rest_be_done() {
        let (seat, place) = Seat::here();
        drop(seat);
        let failed = place.live(|| Err(io::ErrorKind::OutOfMemory.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn others_wait_until_the_place_is_left_and_its_own_thread_never_does() {
        let (mut seat, place) = Seat::here();
        seat.thread.wait();
        let waits = std::thread::spawn(move || seat.thread.wait());
        drop(place);
        waits.join().unwrap();
    }
}
