//! The memory balloon (section 5.5): memory that the guest gives back, and takes again.
//!
//! In: page numbers and reported blocks from the driver, a target from the host. Out: memory for the host to drop. Holds:
//! only what lies in guest RAM is dropped, and the contents of what was given back are nobody's any more, so that a
//! snapshot need not hold them.
//!
//! Offered are `DEFLATE_ON_OOM`, by which a guest in need takes pages back before it kills a process, and `REPORTING`, by
//! which it tells of free memory without being asked. Without `PAGE_POISON` a Linux that fills free pages with a pattern
//! does not report (`virtballoon_validate`).

use super::{Broken, Device, Guest, Segment, TURN};
use crate::Persist;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Queues of features that aren't offered have no number, so this one follows directly.
const REPORT: usize = 2;

/// Bytes of a balloon page, whatever the guest's page size (section 5.5.6).
const PAGE: u64 = 4096;
/// Most page numbers in one buffer; Linux sends up to 256.
const PAGES_MAX: u64 = 1024;
/// Where the configuration's `actual` is: how many pages the driver says it has given.
const ACTUAL: u64 = 4;

/// Drops guest memory: it reads as zero or as anything afterwards, and takes no memory of the host until it is written.
pub trait Discard: Send {
    /// Drops a range, which lies in guest RAM.
    fn discard(&mut self, range: Segment);
}

/// What survives of a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// How many pages the host wants.
    pub target: u32,
    /// How many the driver says it has given.
    pub actual: u32,
}

/// A memory balloon.
pub struct Balloon {
    state: BalloonState,
    host: Box<dyn Discard>,
}

impl Balloon {
    /// Asks the guest for `bytes` in all, rounded down to pages. The driver must be told that the configuration has changed.
    pub fn set_target(&mut self, bytes: u64) {
        self.state.target = (bytes / PAGE).min(u64::from(u32::MAX)) as u32;
    }

    /// Bytes that the host wants, and that the driver says it has given.
    pub fn sizes(&self) -> (u64, u64) {
        (u64::from(self.state.target) * PAGE, u64::from(self.state.actual) * PAGE)
    }

    fn inflate(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(INFLATE)? else { return Ok(()) };
            let mut numbers = vec![0; chain.readable.len().min(PAGES_MAX * 4) as usize];
            chain.readable.read(guest.memory, 0, &mut numbers)?;
            for run in runs(&numbers) {
                if !guest.memory.check_range(GuestAddress(run.address), run.len as usize) {
                    return Err(Broken::new(format!("a balloon page at {:#x}, outside RAM", run.address)));
                }
                self.host.discard(run);
            }
            guest.push(INFLATE, chain.head, 0)?;
        }
        guest.again(INFLATE);
        Ok(())
    }

    /// What is reported are the writable pieces themselves.
    fn report(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(REPORT)? else { return Ok(()) };
            chain.writable.as_slice().iter().for_each(|block| self.host.discard(*block));
            guest.push(REPORT, chain.head, 0)?;
        }
        guest.again(REPORT);
        Ok(())
    }
}

/// Memory that is taken back comes by itself when it is touched.
fn deflate(guest: &mut Guest) -> Result<(), Broken> {
    for _ in 0..TURN {
        let Some(chain) = guest.pop(DEFLATE)? else { return Ok(()) };
        guest.push(DEFLATE, chain.head, 0)?;
    }
    guest.again(DEFLATE);
    Ok(())
}

/// Runs of pages that follow each other, in the order given or backwards: Linux gives them as they come.
fn runs(numbers: &[u8]) -> Vec<Segment> {
    let mut pages: Vec<_> =
        numbers.chunks_exact(4).map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]])).collect();
    pages.sort_unstable();
    let mut runs: Vec<Segment> = Vec::new();
    for page in pages {
        let address = u64::from(page) * PAGE;
        match runs.last_mut() {
            Some(run) if run.address + u64::from(run.len) == address => run.len += PAGE as u32,
            Some(run) if run.address + u64::from(run.len) > address => {}
            _ => runs.push(Segment { address, len: PAGE as u32 }),
        }
    }
    runs
}

impl Device for Balloon {
    const ID: u32 = 5;
    const QUEUES: &'static [u16] = &[128, 128, 32];

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }

    fn config(&self) -> Vec<u8> {
        [self.state.target.to_le_bytes(), self.state.actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.state.actual = u32::from_le_bytes(actual);
        }
    }

    fn reset(&mut self) {
        self.state.actual = 0;
    }

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        match queue {
            INFLATE => self.inflate(guest),
            REPORT => self.report(guest),
            _ => deflate(guest),
        }
    }
}

impl Persist for Balloon {
    type State = BalloonState;
    type Host = Box<dyn Discard>;
    type Error = std::convert::Infallible;

    fn save(&self) -> BalloonState {
        self.state
    }

    fn from_state(state: &BalloonState, host: Box<dyn Discard>) -> Result<Self, Self::Error> {
        Ok(Self { state: *state, host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::hostile;
    use crate::virtio::testing::{Driver, RAM};
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Dropped(Arc<Mutex<Vec<Segment>>>);

    impl Discard for Dropped {
        fn discard(&mut self, range: Segment) {
            self.0.lock().unwrap().push(range);
        }
    }

    impl Dropped {
        fn take(&self) -> Vec<(u64, u32)> {
            self.0.lock().unwrap().drain(..).map(|range| (range.address, range.len)).collect()
        }
    }

    fn host(dropped: &Dropped) -> Box<dyn Discard> {
        Box::new(dropped.clone())
    }

    fn driver() -> (Driver<Balloon>, Dropped) {
        let dropped = Dropped::default();
        (Driver::new(BalloonState::default(), host(&dropped), 0), dropped)
    }

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    #[test]
    fn pages_that_are_given_are_dropped_in_runs() {
        let (mut driver, dropped) = driver();
        driver.lend(INFLATE, &[&numbers(&[0x43, 0x42, 0x41, 0x80, 0x80])], &[]);
        driver.notify(INFLATE);
        assert_eq!(dropped.take(), [(0x4_1000, 0x3000), (0x8_0000, 0x1000)]);
        assert_eq!(driver.used(INFLATE), [(0, 0)]);
    }

    #[test]
    fn a_page_outside_ram_is_a_rule_broken() {
        let (mut driver, dropped) = driver();
        driver.lend(INFLATE, &[&numbers(&[u32::MAX])], &[]);
        driver.notify(INFLATE);
        assert!(driver.needs_reset() && dropped.take().is_empty());
    }

    #[test]
    fn reported_blocks_are_dropped() {
        let (mut driver, dropped) = driver();
        driver.lend_raw(REPORT, &[(0x4_0000, 0x2_0000, 2), (0x8_0000, 0x1_0000, 2)]);
        driver.notify(REPORT);
        assert_eq!(dropped.take(), [(0x4_0000, 0x2_0000), (0x8_0000, 0x1_0000)]);
        assert_eq!(driver.used(REPORT).len(), 1);
    }

    /// Found by the hostile guest: a piece without bytes may have any address, and went to the host as it was.
    #[test]
    fn a_reported_block_of_no_bytes_is_nothing() {
        let (mut driver, dropped) = driver();
        let head = driver.lend_raw(REPORT, &[(u64::MAX, 0, 2), (0x4_0000, 0x1000, 2)]);
        driver.notify(REPORT);
        assert_eq!(dropped.take(), [(0x4_0000, 0x1000)]);
        assert_eq!(driver.used(REPORT), [(head, 0)]);
    }

    #[test]
    fn the_target_is_told_and_survives() {
        let (mut driver, dropped) = driver();
        driver.device.work(|balloon, guest| {
            balloon.set_target(3 << 20);
            guest.change_config();
            Ok(())
        });
        assert_eq!(driver.read(0x60) & 2, 2);
        assert_eq!(driver.read(0x100), 768);
        driver.write(0x104, 700);
        let mut driver = driver.restored(host(&dropped));
        assert_eq!((driver.read(0x100), driver.read(0x104)), (768, 700));
        assert_eq!(driver.device.device().sizes(), (3 << 20, 700 << 12));
    }

    proptest! {
        #[test]
        fn hostile_buffers(
            buffers in prop::collection::vec((0usize..3, any::<u64>(), any::<u32>(), any::<u16>()), 0..50),
            bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let (mut driver, dropped) = driver();
            for (queue, address, len, flags) in buffers {
                driver.lend(queue, &[&bytes], &[]);
                driver.lend_raw(queue, &[(address % 0x20_0000, len % 0x20_0000, flags & 2)]);
                driver.notify(queue);
            }
            for (address, len) in dropped.take() {
                prop_assert!(address + u64::from(len) <= RAM as u64);
            }
        }

        /// Whatever a guest does and a snapshot holds: nothing panics or hangs, what is saved is taken back, and only guest RAM
        /// is dropped.
        #[test]
        fn any_guest_and_any_snapshot(acts in hostile::acts()) {
            let dropped = Dropped::default();
            hostile::attack::<Balloon>(BalloonState::default(), |_| host(&dropped), acts);
            for (address, len) in dropped.take() {
                prop_assert!(address + u64::from(len) <= RAM as u64);
            }
        }
    }
}
