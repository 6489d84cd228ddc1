//! For tests: guests, and snapshot files, that do anything to a device of any kind.
//!
//! In: a device, how its host ends are made anew, any [`Act`]s. Out: the driver as it is after them. Holds: a device that is
//! saved is always one that restores, and that is the same when it is saved again at once.

use super::testing::{Driver, RAM};
use super::{Device, Mmio, MmioHost, MmioState, Transport};
use crate::Memory;
use crate::{BusDevice, Persist};
use proptest::prelude::*;
use proptest::{collection::vec, sample::Index};
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

/// Without this feature no device of ours is driven.
const VERSION_1: u64 = 1 << 32;

/// What is done to a device.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// A write and a read of the window, registers and configuration.
    Access(u64, Vec<u8>),
    /// A register is written as a driver writes it.
    Register(u64, u32),
    /// Bytes of guest RAM where the queues are, or where buffers are.
    Memory(u64, Vec<u8>),
    /// A chain of descriptors (address, length, flags) is lent to this queue.
    Lend(Index, Vec<(u64, u32, u16)>),
    /// A buffer as a driver lends it: bytes to read, and room to write. One whose device is out of order begins anew first.
    Ask(Index, Vec<u8>, u32),
    Notify(u32),
    /// The host has something, or may have.
    Host,
    Drain,
    /// The driver begins anew, with these features refused.
    StartOver(u64),
    Restore,
    /// As [`Act::Restore`], from a file in which some bytes have been replaced.
    Forge(Vec<(Index, u8)>),
}

/// Sequences of acts. Most are near what is right, so that they have effects.
pub(crate) fn acts() -> impl Strategy<Value = Vec<Act>> {
    vec(act(), 0..80)
}

fn act() -> impl Strategy<Value = Act> {
    let offset = prop_oneof![4 => 0u64..0x100, 4 => 0x100u64..0x140, 1 => any::<u64>()];
    let value = prop_oneof![4 => 0u32..16, 2 => 0u32..0x1_0000, 1 => any::<u32>()];
    let rings = prop_oneof![6 => 0u64..0xc000, 1 => 0x2_0000u64..RAM as u64 - 64];
    let bytes = vec(prop_oneof![0u8..4, any::<u8>()], 1..32);
    let address = prop_oneof![6 => 0x2_0000u64..RAM as u64, 1 => 0u64..0xc000, 1 => any::<u64>()];
    let len = prop_oneof![2 => 0u32..64, 4 => 0u32..5000, 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(0u16), 4 => Just(2), 1 => any::<u16>()];
    let small = vec(prop_oneof![6 => Just(0), 3 => 0u8..5, 1 => any::<u8>()], 0..80);
    let room = prop_oneof![4 => 0u32..3000, 1 => (0u32..6).prop_map(|sectors| sectors * 512 + 1)];
    prop_oneof![
        3 => (offset, vec(any::<u8>(), 1..9)).prop_map(|(offset, data)| Act::Access(offset, data)),
        3 => (0u64..0x50, value).prop_map(|(register, value)| Act::Register(register * 4, value)),
        2 => (rings, bytes).prop_map(|(at, bytes)| Act::Memory(at, bytes)),
        6 => (any::<Index>(), vec((address, len, flags), 1..6)).prop_map(|(queue, chain)| Act::Lend(queue, chain)),
        6 => (any::<Index>(), small, room).prop_map(|(queue, bytes, room)| Act::Ask(queue, bytes, room)),
        3 => (0u32..4).prop_map(Act::Notify),
        3 => Just(Act::Host),
        1 => Just(Act::Drain),
        2 => prop_oneof![Just(0), any::<u64>()].prop_map(|refused| Act::StartOver(refused & !VERSION_1)),
        2 => Just(Act::Restore),
        2 => vec((any::<Index>(), any::<u8>()), 1..4).prop_map(Act::Forge),
    ]
}

/// Does it all, and returns the driver at the end.
pub(crate) fn attack<D: Device + Persist>(
    state: D::State,
    mut host: impl FnMut(&Memory) -> D::Host,
    acts: Vec<Act>,
) -> Driver<D> {
    let memory = super::testing::ram();
    let ends = host(&memory);
    let mut driver = Driver::<D>::untouched_in(memory, state, ends);
    driver.negotiate(0);
    for act in acts {
        perform(&mut driver, &mut host, act);
    }
    driver
}

fn perform<D: Device + Persist>(driver: &mut Driver<D>, host: &mut impl FnMut(&Memory) -> D::Host, act: Act) {
    match act {
        Act::Access(offset, mut data) => {
            assert_eq!(driver.device.write(offset, &data), None);
            driver.device.read(offset, &mut data);
        }
        Act::Register(offset, value) => {
            driver.write(offset, value);
            driver.read(offset);
        }
        Act::Memory(at, bytes) => driver.memory.write_slice(&bytes, GuestAddress(at)).unwrap(),
        Act::Lend(queue, chain) => {
            let queue = queue.index(D::QUEUES.len());
            driver.lend_raw(queue, &chain);
            driver.notify(queue);
        }
        Act::Ask(queue, bytes, room) => {
            let queue = queue.index(D::QUEUES.len());
            if !driver.device.is_live() {
                driver.start_over(0);
            }
            driver.rewind();
            driver.lend(queue, &[&bytes], &[room]);
            driver.notify(queue);
        }
        Act::Notify(queue) => driver.write(0x50, queue),
        Act::Host => driver.device.host_ready(),
        Act::Drain => driver.device.drain(Instant::now()),
        Act::StartOver(refused) => driver.start_over(refused),
        Act::Restore => restore(driver, host),
        Act::Forge(bytes) => forge(driver, host, &bytes),
    }
}

fn encoded<D: Device + Persist>(device: &Mmio<D>) -> Vec<u8> {
    postcard::to_stdvec(&device.save()).unwrap()
}

fn ends<D: Device + Persist>(
    driver: &Driver<D>,
    host: &mut impl FnMut(&Memory) -> D::Host,
) -> MmioHost<D::Host> {
    let device = host(&driver.memory);
    MmioHost { memory: driver.memory.clone(), irq: Box::new(driver.irq.clone()), device }
}

fn restore<D: Device + Persist>(driver: &mut Driver<D>, host: &mut impl FnMut(&Memory) -> D::Host) {
    let saved = encoded(&driver.device);
    let state: MmioState<D::State> = postcard::from_bytes(&saved).unwrap();
    let ends = ends(driver, host);
    driver.device = Mmio::from_state(&state, ends).unwrap();
    assert_eq!(encoded(&driver.device), saved, "saved again at once it is another");
    driver.device.start();
}

/// A file whose checksums are right, and whose contents are not. If it is refused, the good one is restored.
fn forge<D: Device + Persist>(
    driver: &mut Driver<D>,
    host: &mut impl FnMut(&Memory) -> D::Host,
    bytes: &[(Index, u8)],
) {
    let mut saved = encoded(&driver.device);
    for (at, byte) in bytes {
        let at = at.index(saved.len());
        saved[at] = *byte;
    }
    let Ok(state) = postcard::from_bytes::<MmioState<D::State>>(&saved) else { return };
    let ends = ends(driver, host);
    match Mmio::from_state(&state, ends) {
        Ok(device) => {
            driver.device = device;
            driver.device.start();
        }
        Err(_) => restore(driver, host),
    }
}
