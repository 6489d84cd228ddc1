//! The console (section 5.3): one port, `hvc0` for Linux, without a size and without control messages.
//!
//! In: bytes from the driver, typed bytes from the host. Out: the same, each to the other. Holds: a host that does not take
//! its output makes the guest wait, not this process: what there is no room for stays in the driver's queue.

use super::{Broken, Device, Guest, TURN};
use crate::Persist;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

const INPUT: usize = 0;
const OUTPUT: usize = 1;

/// Most bytes that are kept for a driver that reads slowly.
const TYPED_MAX: usize = 4096;
/// Most bytes taken out of the driver's queue at once.
const PIECE: u64 = 4096;

/// Where output goes.
pub trait Output: Send {
    /// Takes as many of the bytes as there is room for, at once, and returns how many.
    fn put(&mut self, bytes: &[u8]) -> usize;
    /// Becomes readable when there is room again after there was none.
    fn room_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What survives of a console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Typed bytes that the driver has not read yet.
    pub typed: Vec<u8>,
    /// How much of the first buffer in the output queue has been put out.
    pub sent: u64,
}

/// A state that no console can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} typed bytes, expected at most {TYPED_MAX}")]
pub struct ConsoleStateError(usize);

/// A console.
pub struct Console {
    typed: VecDeque<u8>,
    sent: u64,
    out: Box<dyn Output>,
}

impl Console {
    /// How many typed bytes it takes now.
    pub fn room(&self) -> usize {
        TYPED_MAX - self.typed.len()
    }

    /// Takes typed bytes, as many as there is room for, and gives the driver what it has buffers for.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn enqueue(&mut self, bytes: &[u8], guest: &mut Guest) -> Result<(), Broken> {
        self.typed.extend(&bytes[..bytes.len().min(self.room())]);
        self.give_typed(guest)
    }

    fn give_typed(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            if self.typed.is_empty() {
                return Ok(());
            }
            let Some(chain) = guest.pop(INPUT)? else { return Ok(()) };
            let written = chain.writable.write(guest.memory, 0, self.typed.make_contiguous())?;
            self.typed.drain(..written);
            guest.push(INPUT, chain.head, written as u32)?;
        }
        guest.again(INPUT);
        Ok(())
    }

    fn put_out(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(OUTPUT)? else { return Ok(()) };
            // A buffer's pieces may overlap, so it can be longer than RAM: one piece is a turn's share.
            if self.sent < chain.readable.len() {
                let mut piece = vec![0; (chain.readable.len() - self.sent).min(PIECE) as usize];
                chain.readable.read(guest.memory, self.sent, &mut piece)?;
                let put = self.out.put(&piece);
                self.sent += put as u64;
                if put < piece.len() {
                    guest.unpop(OUTPUT);
                    return Ok(());
                }
            }
            if self.sent < chain.readable.len() {
                guest.unpop(OUTPUT);
            } else {
                self.sent = 0;
                guest.push(OUTPUT, chain.head, 0)?;
            }
        }
        guest.again(OUTPUT);
        Ok(())
    }
}

impl Device for Console {
    const ID: u32 = 3;
    const QUEUES: &'static [u16] = &[64, 64];

    fn reset(&mut self) {
        self.sent = 0;
    }

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        if queue == OUTPUT { self.put_out(guest) } else { self.give_typed(guest) }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.out.room_fd()
    }

    fn host_ready(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.put_out(guest)
    }
}

impl Persist for Console {
    type State = ConsoleState;
    type Host = Box<dyn Output>;
    type Error = ConsoleStateError;

    fn save(&self) -> ConsoleState {
        ConsoleState { typed: self.typed.iter().copied().collect(), sent: self.sent }
    }

    fn from_state(state: &ConsoleState, out: Box<dyn Output>) -> Result<Self, ConsoleStateError> {
        if state.typed.len() > TYPED_MAX {
            return Err(ConsoleStateError(state.typed.len()));
        }
        Ok(Self { typed: state.typed.iter().copied().collect(), sent: state.sent, out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;
    use crate::virtio::{Transport, hostile};
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    /// Room for so many bytes, and what came.
    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Output for Paper {
        fn put(&mut self, bytes: &[u8]) -> usize {
            let (room, written) = &mut *self.0.lock().unwrap();
            let taken = bytes.len().min(*room);
            *room -= taken;
            written.extend(&bytes[..taken]);
            taken
        }

        fn room_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    impl Paper {
        fn make_room(&self, room: usize) {
            self.0.lock().unwrap().0 = room;
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().1.clone()).unwrap()
        }
    }

    fn host(paper: &Paper) -> Box<dyn Output> {
        Box::new(paper.clone())
    }

    fn driver() -> (Driver<Console>, Paper) {
        let paper = Paper::default();
        paper.make_room(1 << 20);
        (Driver::new(ConsoleState::default(), host(&paper), 0), paper)
    }

    #[test]
    fn output_comes_out_in_order() {
        let (mut driver, paper) = driver();
        driver.lend(OUTPUT, &[b"hello, ", b"world"], &[]);
        driver.lend(OUTPUT, &[b"!\n"], &[]);
        driver.notify(OUTPUT);
        assert_eq!(paper.text(), "hello, world!\n");
        assert_eq!(driver.used(OUTPUT).len(), 2);
    }

    #[test]
    fn output_without_room_waits_and_is_neither_lost_nor_repeated_by_a_restore() {
        let (mut driver, paper) = driver();
        paper.make_room(3);
        driver.lend(OUTPUT, &[b"slow reader"], &[]);
        driver.notify(OUTPUT);
        assert_eq!(paper.text(), "slo");
        assert!(driver.used(OUTPUT).is_empty());
        paper.make_room(2);
        driver.device.host_ready();
        assert_eq!(paper.text(), "slow ");
        paper.make_room(100);
        let mut driver = driver.restored(host(&paper));
        assert_eq!(paper.text(), "slow reader");
        assert_eq!(driver.used(OUTPUT).len(), 1);
    }

    /// A buffer of pieces that overlap, longer than RAM, kept the device's lock until it was out.
    #[test]
    fn a_long_output_has_turns() {
        let (mut driver, paper) = driver();
        const MIB: u32 = (TURN as u64 * PIECE) as u32;
        paper.make_room(usize::MAX);
        let pieces = 5;
        driver.lend_raw(OUTPUT, &[(0, MIB, 0); 5]);
        for turn in 1..pieces {
            driver.device.notified(OUTPUT);
            assert_eq!(paper.0.lock().unwrap().1.len(), turn * MIB as usize);
            assert_eq!(driver.device.unfinished(), 1 << OUTPUT);
        }
        (0..2).for_each(|_| driver.device.notified(OUTPUT));
        assert_eq!(paper.0.lock().unwrap().1.len(), pieces * MIB as usize);
        assert_eq!(driver.used(OUTPUT).len(), 1);
    }

    #[test]
    fn typed_bytes_wait_for_buffers_and_survive() {
        let (mut driver, paper) = driver();
        driver.device.work(|console, guest| console.enqueue(b"ls -l\n", guest));
        let mut driver = driver.restored(host(&paper));
        let (_, first) = driver.lend(INPUT, &[], &[4]);
        let (_, second) = driver.lend(INPUT, &[], &[64]);
        driver.notify(INPUT);
        assert_eq!(driver.used(INPUT).iter().map(|used| used.1).collect::<Vec<_>>(), [4, 2]);
        assert_eq!([driver.bytes(first[0], 4), driver.bytes(second[0], 2)].concat(), b"ls -l\n");
    }

    #[test]
    fn a_state_with_too_much_is_refused() {
        let state = ConsoleState { typed: vec![0; TYPED_MAX + 1], sent: 0 };
        assert!(Console::from_state(&state, Box::new(Paper::default())).is_err());
    }

    proptest! {
        #[test]
        fn hostile_buffers(
            buffers in prop::collection::vec((0usize..2, any::<u64>(), any::<u32>(), any::<u16>()), 0..50),
            sent in any::<u64>(),
        ) {
            let paper = Paper::default();
            paper.make_room(1000);
            let state = ConsoleState { typed: vec![1; 100], sent };
            let mut driver = Driver::<Console>::new(state, host(&paper), 0);
            for (queue, address, len, flags) in buffers {
                driver.lend_raw(queue, &[(address % 0x20_0000, len % 0x20_0000, flags & 2)]);
                driver.notify(queue);
                driver.device.host_ready();
            }
        }

        /// Whatever a guest does and a snapshot holds: nothing panics or hangs, and what is saved is taken back.
        #[test]
        fn any_guest_and_any_snapshot(acts in hostile::acts()) {
            let paper = Paper::default();
            let full = |_: &_| {
                paper.make_room(5000);
                host(&paper)
            };
            hostile::attack::<Console>(ConsoleState { typed: vec![1; 100], sent: 0 }, full, acts);
        }
    }
}
