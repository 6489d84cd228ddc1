//! The entropy device (section 5.4): random bytes from the host.
//!
//! In: buffers to fill. Out: the same, filled. Holds: there is no state, so a restored guest draws other bytes than its twin.

use super::{Broken, Device, Guest, TURN};
use crate::Persist;
use std::convert::Infallible;
use std::io;

/// Where random bytes come from: fills the whole slice.
pub type Entropy = Box<dyn FnMut(&mut [u8]) -> io::Result<()> + Send>;

/// Most bytes given at once. A driver asks again if it wants more.
const MOST: u64 = 64 << 10;

/// An entropy device.
pub struct Rng {
    entropy: Entropy,
}

impl Device for Rng {
    const ID: u32 = 4;
    const QUEUES: &'static [u16] = &[64];

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(queue)? else { return Ok(()) };
            let mut bytes = vec![0; chain.writable.len().min(MOST) as usize];
            // Linux takes an empty answer as "try again".
            let filled = match (self.entropy)(&mut bytes) {
                Ok(()) => chain.writable.write(guest.memory, 0, &bytes)?,
                Err(_) => 0,
            };
            guest.push(queue, chain.head, filled as u32)?;
        }
        guest.again(queue);
        Ok(())
    }
}

impl Persist for Rng {
    type State = ();
    type Host = Entropy;
    type Error = Infallible;

    fn save(&self) {}

    fn from_state((): &(), entropy: Entropy) -> Result<Self, Infallible> {
        Ok(Self { entropy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::hostile;
    use crate::virtio::testing::Driver;
    use proptest::proptest;

    fn driver() -> Driver<Rng> {
        let mut next = 0u8;
        let count: Entropy = Box::new(move |bytes| {
            bytes.iter_mut().for_each(|byte| {
                next = next.wrapping_add(1);
                *byte = next;
            });
            Ok(())
        });
        Driver::new((), count, 0)
    }

    #[test]
    fn a_buffer_comes_back_full() {
        let mut driver = driver();
        let (head, at) = driver.lend(0, &[], &[4, 3]);
        driver.notify(0);
        assert_eq!(driver.used(0), [(head, 7)]);
        assert_eq!(driver.bytes(at[0], 4), [1, 2, 3, 4]);
        assert_eq!(driver.bytes(at[1], 3), [5, 6, 7]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn no_more_than_a_bounded_number_of_bytes_is_made() {
        let mut driver = driver();
        let head = driver.lend_raw(0, &[(0x2_0000, 0xc_0000, 2)]);
        driver.notify(0);
        assert_eq!(driver.used(0), [(head, MOST as u32)]);
    }

    #[test]
    fn it_goes_on_after_a_restore() {
        let mut driver = driver();
        driver.lend(0, &[], &[4]);
        let mut driver = driver.restored(Box::new(|bytes| {
            bytes.fill(9);
            Ok(())
        }));
        assert_eq!(driver.used(0), [(0, 4)], "a notification that was lost on the way is repeated");
    }

    proptest! {
        /// Whatever a guest does and a snapshot holds: nothing panics or hangs, and what is saved is taken back.
        #[test]
        fn any_guest_and_any_snapshot(acts in hostile::acts()) {
            let sevens = |_: &_| -> Entropy {
                Box::new(|bytes| {
                    bytes.fill(7);
                    Ok(())
                })
            };
            hostile::attack::<Rng>((), sevens, acts);
        }
    }
}
