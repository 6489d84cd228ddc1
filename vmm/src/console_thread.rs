//! The virtio console's way out: standard output, written by a thread that may wait for its reader.
//!
//! In: bytes from the I/O thread, which must not wait. Out: the same bytes on standard output, and word when there is room
//! again. Holds: at most `ROOM` bytes are kept; what has no room stays with the guest.

use crate::panic_watch::{PanicWatch, Watched};
use devices::lock;
use devices::virtio::Output;
use std::collections::VecDeque;
use std::io::{self, Stdout, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Most bytes on their way.
const ROOM: usize = 64 << 10;
/// Most bytes written at once.
const PIECE: usize = 4096;
/// How long the end waits for a reader.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Standard output, for a virtio console.
pub struct ConsoleThread {
    shared: Arc<Shared>,
}

struct Shared {
    pending: Mutex<Pending>,
    changed: Condvar,
    room: EventFd,
}

#[derive(Default)]
struct Pending {
    bytes: VecDeque<u8>,
    refused: bool,
    ended: bool,
}

impl ConsoleThread {
    /// Starts the thread; `watch` sees what goes out.
    ///
    /// # Errors
    /// The host has no thread or descriptor to give.
    pub fn stdout(watch: PanicWatch) -> io::Result<Self> {
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { pending: Mutex::default(), changed: Condvar::new(), room });
        let (theirs, out) = (shared.clone(), watch.over(io::stdout()));
        std::thread::Builder::new().name("console".to_owned()).spawn(move || theirs.write_out(out))?;
        Ok(Self { shared })
    }
}

impl Shared {
    /// Bytes count as pending until they are written.
    fn write_out(&self, mut out: Watched<Stdout>) {
        while let Some(piece) = self.next_piece() {
            // Nobody may be there to read: then the bytes are lost, as on a serial line.
            let _ = out.write_all(&piece).and_then(|()| out.flush());
            let mut pending = lock(&self.pending);
            pending.bytes.drain(..piece.len());
            self.changed.notify_all();
            if std::mem::take(&mut pending.refused) {
                let _ = self.room.write(1);
            }
        }
    }

    fn next_piece(&self) -> Option<Vec<u8>> {
        let pending = lock(&self.pending);
        let waited = self.changed.wait_while(pending, |pending| pending.bytes.is_empty() && !pending.ended);
        let pending = waited.unwrap_or_else(PoisonError::into_inner);
        let piece: Vec<_> = pending.bytes.iter().take(PIECE).copied().collect();
        (!piece.is_empty()).then_some(piece)
    }
}

impl Output for ConsoleThread {
    fn put(&mut self, bytes: &[u8]) -> usize {
        let mut pending = lock(&self.shared.pending);
        let taken = bytes.len().min(ROOM - pending.bytes.len());
        pending.bytes.extend(&bytes[..taken]);
        pending.refused = taken < bytes.len();
        self.shared.changed.notify_all();
        taken
    }

    fn room_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the event lives in `shared`, which `self` holds.
        Some(unsafe { BorrowedFd::borrow_raw(self.shared.room.as_raw_fd()) })
    }
}

/// What is on its way goes out if somebody reads; the thread ends with the process otherwise.
impl Drop for ConsoleThread {
    fn drop(&mut self) {
        let mut pending = lock(&self.shared.pending);
        pending.ended = true;
        self.shared.changed.notify_all();
        drop(
            self.shared.changed.wait_timeout_while(pending, LAST_WORDS, |pending| !pending.bytes.is_empty()),
        );
    }
}
