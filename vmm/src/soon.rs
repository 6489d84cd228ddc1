//! Waiting for what is about to come.
//!
//! In: a channel. Out: what comes. Holds: whoever waits here looks again and again for a moment, and leaves the processor to others between,
//! before it goes to sleep: to be woken takes longer (50 to 250 µs where the host is a guest itself) than most of what is waited for here.

use std::sync::mpsc::{Receiver, RecvError, TryRecvError};
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::mpsc::channel;

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
    fn nobody_looks_for_ever() {
        let looked = Cell::new(0);
        see(|| looked.replace(looked.get() + 1) == usize::MAX);
        see(|| true);
    }
}
