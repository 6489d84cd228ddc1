//! The transport, driven by a driver that keeps the rules and by one that doesn't.

use super::*;
use crate::virtio::testing::{Driver, Line, RAM};
use crate::virtio::{Device, Entropy, Rng};
use proptest::prelude::*;

fn sevens() -> Entropy {
    Box::new(|bytes| {
        bytes.fill(7);
        Ok(())
    })
}

fn driver() -> Driver<Rng> {
    Driver::new((), sevens(), 0)
}

#[test]
fn a_device_says_what_it_is() {
    let mut driver = driver();
    assert_eq!([0, 4, 8].map(|offset| driver.read(offset)), [0x7472_6976, 2, Rng::ID]);
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is one queue");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut driver = Driver::<Rng>::untouched((), sevens());
    driver.write(0x70, 3);
    driver.write(0x24, 0);
    driver.write(0x20, 1);
    driver.write(0x24, 1);
    driver.write(0x20, 1);
    driver.write(0x70, 11);
    assert_eq!(driver.read(0x70), 3);
}

#[test]
fn a_notification_of_no_queue_is_nothing() {
    let mut driver = driver();
    [1, 63, 64, u32::MAX].into_iter().for_each(|queue| driver.write(0x50, queue));
    assert!(!driver.needs_reset());
}

#[test]
fn an_interrupt_has_a_reason_until_it_is_acknowledged() {
    let mut driver = driver();
    driver.lend(0, &[], &[1]);
    driver.notify(0);
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again_by_a_restore() {
    let mut driver = driver();
    driver.lend(0, &[], &[1]);
    driver.notify(0);
    assert_eq!(driver.interrupts(), 1);
    let mut driver = driver.restored(sevens());
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.read(0x60), 1);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn a_restored_device_is_saved_as_it_was() {
    let mut driver = driver();
    driver.lend(0, &[], &[1]);
    driver.notify(0);
    let saved = driver.device.save();
    let driver = driver.restored(sevens());
    assert_eq!(driver.device.save(), saved);
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = driver();
    driver.lend(0, &[], &[1]);
    driver.notify(0);
    driver.write(0x70, 0);
    let fresh = Driver::<Rng>::untouched((), sevens()).device.save();
    assert_eq!(driver.device.save(), fresh);
}

/// Each would be an endless loop, a wild access or half a buffer if it were believed.
#[test]
fn a_broken_driver_needs_a_reset_and_gets_one() {
    type Crime = fn(&mut Driver<Rng>);
    let crimes: [(&str, Crime); 7] = [
        ("a loop of descriptors", |driver| {
            driver.descriptor(0, 0, 0x2_0000, 1, 3, 1);
            driver.descriptor(0, 1, 0x2_0000, 1, 3, 0);
            driver.offer(0, 0);
        }),
        ("a next descriptor that is none", |driver| {
            driver.descriptor(0, 0, 0x2_0000, 1, 3, 999);
            driver.offer(0, 0);
        }),
        ("a head that is none", |driver| driver.offer(0, 999)),
        ("a buffer outside RAM", |driver| {
            driver.lend_raw(0, &[(RAM as u64 - 1, 2, 2)]);
        }),
        ("a buffer at the end of the address space", |driver| {
            driver.lend_raw(0, &[(u64::MAX, 2, 2)]);
        }),
        ("something to read after something to write", |driver| {
            driver.lend_raw(0, &[(0x2_0000, 1, 2), (0x2_0000, 1, 0)]);
        }),
        ("an indirect table of no size", |driver| {
            driver.lend_raw(0, &[(0x2_0000, 7, 4)]);
        }),
    ];
    for (crime, commit) in crimes {
        let mut driver = driver();
        commit(&mut driver);
        driver.notify(0);
        assert!(driver.needs_reset(), "{crime}");
        assert_eq!(driver.read(0x60) & 2, 2, "{crime}: told as a change of configuration");
        assert!(driver.used(0).is_empty(), "{crime}");
        let mut driver = driver.restored(sevens());
        assert!(driver.needs_reset(), "{crime}: still after a restore");
    }
}

#[test]
fn queues_outside_ram_are_refused_when_the_driver_is_ready() {
    let mut driver = Driver::<Rng>::untouched((), sevens());
    driver.negotiate(0);
    driver.write(0x70, 0);
    for (offset, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x38, 64), (0x80, RAM as u32)] {
        driver.write(offset, value);
    }
    driver.write(0x44, 1);
    driver.write(0x70, 15);
    assert!(driver.needs_reset());
}

/// Found by the hostile guest: said in this order, the device was live without its queues having been looked at, and a
/// snapshot of it could not be restored.
#[test]
fn queues_are_looked_at_in_whichever_order_a_driver_says_that_it_is_ready() {
    let mut driver = Driver::<Rng>::untouched((), sevens());
    driver.negotiate(0);
    driver.write(0x70, 0);
    for (offset, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x38, 64), (0x80, RAM as u32), (0x44, 1)] {
        driver.write(offset, value);
    }
    driver.write(0x70, 4);
    assert!(!driver.needs_reset());
    driver.write(0x70, 8);
    assert!(driver.needs_reset());
    driver.restored(sevens());
}

#[test]
fn a_state_that_no_device_can_have_is_refused() {
    let good = driver().device.save();
    let spoil = |spoil: fn(&mut RegistersState)| {
        let mut state = good.clone();
        spoil(state.registers.as_mut().unwrap());
        let memory = Memory::from_ranges(&[(vm_memory::GuestAddress(0), RAM)]).unwrap();
        let irq = Box::new(Line::default());
        Mmio::<Rng>::from_state(&state, MmioHost { memory, irq, device: sevens() }).is_err()
    };
    assert!(spoil(|state| state.queues.clear()));
    assert!(spoil(|state| state.queues[0].size = 512));
    assert!(spoil(|state| state.queues[0].size = 3));
    assert!(spoil(|state| state.queues[0].used_ring = u64::MAX - 3));
    assert!(spoil(|state| state.driver_features |= 1));
    assert!(!spoil(|_| {}));
}

proptest! {
    /// No sequence of accesses, with any bytes in the queue's memory, panics or hangs.
    #[test]
    fn hostile_registers_and_rings(
        accesses in prop::collection::vec((0u64..0x200, any::<u32>(), 0usize..9), 0..200),
        rings in prop::collection::vec((0u64..0x3000, any::<u16>()), 0..100),
    ) {
        let mut driver = driver();
        for (at, value) in rings {
            vm_memory::Bytes::write_obj(&driver.memory, value, vm_memory::GuestAddress(at)).unwrap();
        }
        for (offset, value, len) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            driver.device.write(offset, &data[..len]);
            driver.device.read(offset, &mut data[..len]);
            driver.notify(0);
        }
    }
}
