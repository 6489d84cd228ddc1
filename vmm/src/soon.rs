//! Waiting for what is about to come.
//!
//! In: a channel. Out: what comes. Holds: whoever waits here looks again and again for a moment, and leaves the processor to others between,
//! before it goes to sleep: to be woken takes longer (50 to 250 µs where the host is a guest itself) than most of what is waited for here.

use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// For how long it looks. All of a restore takes little longer.
const MOMENT: Duration = Duration::from_micros(500);

/// Waits a moment for this to be so.
pub(crate) fn see(is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while begun.elapsed() < MOMENT && !is_so() {
        thread::yield_now();
    }
}

/// As [`Receiver::recv`].
///
/// # Errors
/// Nothing can come any more.
pub(crate) fn recv<T>(from: &Receiver<T>) -> Result<T, RecvError> {
    let begun = Instant::now();
    while begun.elapsed() < MOMENT {
        match from.try_recv() {
            Err(TryRecvError::Empty) => thread::yield_now(),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Ok(came) => return Ok(came),
        }
    }
    from.recv()
}

/// A channel for what takes longer to come than a moment, and can be announced.
pub(crate) fn announced<T>() -> (Herald<T>, Expectant<T>) {
    let (sender, receiver) = channel();
    (Herald(sender), Expectant(receiver))
}

/// The sender's end.
pub(crate) struct Herald<T>(Sender<Option<T>>);

/// The receiver's.
pub(crate) struct Expectant<T>(Receiver<Option<T>>);

impl<T> Herald<T> {
    /// Has whoever sleeps there wake up, and look for another moment.
    pub(crate) fn announce(&self) {
        self.put(None);
    }

    pub(crate) fn send(&self, what: T) {
        self.put(Some(what));
    }

    fn put(&self, what: Option<T>) {
        // It fails only if nobody waits there any more.
        let _ = self.0.send(what);
    }
}

impl<T> Expectant<T> {
    /// As [`recv()`].
    ///
    /// # Errors
    /// Nothing can come any more.
    pub(crate) fn recv(&self) -> Result<T, RecvError> {
        loop {
            if let Some(came) = recv(&self.0)? {
                return Ok(came);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_soon_or_late_or_not_at_all() {
        let (sender, receiver) = channel();
        sender.send(1).unwrap();
        assert_eq!(recv(&receiver), Ok(1));
        let late = thread::spawn(move || {
            thread::sleep(4 * MOMENT);
            sender.send(2).unwrap();
        });
        assert_eq!((recv(&receiver), recv(&receiver)), (Ok(2), Err(RecvError)));
        late.join().unwrap();
    }

    #[test]
    fn what_is_announced_comes_once() {
        let (herald, expectant) = announced();
        herald.announce();
        herald.announce();
        herald.send(1);
        assert_eq!(expectant.recv(), Ok(1));
        herald.announce();
        drop(herald);
        assert_eq!(expectant.recv(), Err(RecvError));
    }
}
