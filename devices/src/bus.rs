//! A bus: which device answers at an address.
//!
//! In: an access at an address, from any vCPU thread. Out: the same access at an offset into one device, under that
//! device's lock. Holds: ranges don't overlap and don't change once vCPUs run, so finding a device takes no lock.

use crate::{BusDevice, Request};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;

/// Why a device was not put on a bus.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// No such range of addresses.
    #[error("{len:#x} addresses from {base:#x} are no range: expected at least one, and none past 2^64")]
    NotARange {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
    /// Another device has some of these addresses.
    #[error("{base:#x}..={last:#x} overlaps the device at {taken_base:#x}..={taken_last:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Last address of the refused range.
        last: u64,
        /// First address of the device that is there.
        taken_base: u64,
        /// Last address of the device that is there.
        taken_last: u64,
    },
}

/// One address space of devices: the I/O ports, or guest physical memory outside RAM.
#[derive(Default)]
pub struct Bus {
    slots: BTreeMap<u64, Slot>,
}

struct Slot {
    last: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has `device` answer at the `len` addresses from `base`.
    ///
    /// # Errors
    /// The range is empty, passes 2^64, or overlaps another device's.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|l| base.checked_add(l)).ok_or(BusError::NotARange { base, len })?;
        // The last device that begins at or before our end is the only one that can reach into us.
        if let Some((&taken_base, taken)) = self.slots.range(..=last).next_back()
            && taken.last >= base
        {
            return Err(BusError::Overlap { base, last, taken_base, taken_last: taken.last });
        }
        self.slots.insert(base, Slot { last, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`. The device that has the first byte answers for all of them; where there
    /// is none, all bits read as one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`, and returns what the device asks of the machine. A write to no device is lost.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Request> {
        let (offset, device) = self.find(address)?;
        lock(device).write(offset, data)
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, slot) = self.slots.range(..=address).next_back()?;
        (address <= slot.last).then(|| (address - base, &*slot.device))
    }
}

/// Locks `mutex` even if a thread panicked while it had it: a device's registers are plain data, valid after any write,
/// and one thread's fault must not spread to the whole machine.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its offset, remembers its last write.
    struct Probe {
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
            assert_ne!(data, [0xdd], "a device that panics");
            self.written = Some((offset, data.to_vec()));
            Some(Request::Exit(offset as u8))
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { written: None }))
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut byte = [0];
        bus.read(address, &mut byte);
        byte[0]
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let (mut bus, device) = (Bus::new(), probe());
        bus.insert(0x100, 8, device.clone()).unwrap();
        assert_eq!(read(&bus, 0x107), 7);
        assert_eq!(bus.write(0x103, &[1, 2]), Some(Request::Exit(3)));
        assert_eq!(lock(&device).written, Some((3, vec![1, 2])));
    }

    #[test]
    fn nobody_reads_as_ones_and_ignores_writes() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, probe()).unwrap();
        for address in [0, 0xff, 0x108, u64::MAX] {
            assert_eq!(read(&bus, address), 0xff);
            assert_eq!(bus.write(address, &[1]), None);
        }
    }

    #[test]
    fn ranges_that_touch_fit_and_ranges_that_overlap_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, probe()).unwrap();
        bus.insert(0x108, 1, probe()).unwrap();
        bus.insert(0xff, 1, probe()).unwrap();
        for (base, len) in [(0x100, 8), (0x107, 1), (0x80, 0x1000), (0xf0, 0x10), (0x0, u64::MAX)] {
            assert!(
                matches!(bus.insert(base, len, probe()), Err(BusError::Overlap { .. })),
                "{base:#x}+{len:#x}"
            );
        }
    }

    #[test]
    fn the_last_address_can_be_had_and_no_further() {
        let mut bus = Bus::new();
        bus.insert(u64::MAX, 1, probe()).unwrap();
        assert_eq!(read(&bus, u64::MAX), 0);
        for (base, len) in [(5, 0), (u64::MAX, 2), (2, u64::MAX)] {
            assert_eq!(bus.insert(base, len, probe()), Err(BusError::NotARange { base, len }));
        }
    }

    #[test]
    fn a_device_that_panicked_still_answers() {
        let mut bus = Bus::new();
        bus.insert(0, 8, probe()).unwrap();
        let bus = Arc::new(bus);
        let other = Arc::clone(&bus);
        assert!(std::thread::spawn(move || other.write(0, &[0xdd])).join().is_err());
        assert_eq!(read(&bus, 5), 5);
        assert_eq!(bus.write(6, &[1]), Some(Request::Exit(6)));
    }
}
