//! A driver for tests: sets a device up as Linux does, lends it buffers, and collects what it used.
//!
//! ```text
//! 0x0000 + q * 0x4000   descriptor table, 256 entries
//! 0x1000 + q * 0x4000   available ring
//! 0x2000 + q * 0x4000   used ring
//! 0x20000 …             buffers, one after another
//! ```

use super::{Device, Mmio, MmioHost, MmioState, Transport};
use crate::Memory;
use crate::{BusDevice, Interrupt, Persist};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const RAM: usize = 1 << 20;
const BUFFERS: u64 = 0x2_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Counts interrupts.
#[derive(Clone, Default)]
pub(crate) struct Line(pub(crate) Arc<AtomicUsize>);

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Guest RAM.
pub(crate) fn ram() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
}

pub(crate) struct Driver<D: Device + Persist> {
    pub(crate) device: Mmio<D>,
    pub(crate) memory: Memory,
    pub(crate) irq: Line,
    queues: Vec<Rings>,
    free: u64,
}

#[derive(Clone, Copy, Default)]
struct Rings {
    avail: u16,
    seen: u16,
    next: u16,
}

impl<D: Device + Persist> Driver<D> {
    /// A device that has been negotiated with, all features accepted but `refused`, every queue 256 entries or what it has.
    pub(crate) fn new(state: D::State, host: D::Host, refused: u64) -> Self {
        let mut driver = Self::untouched(state, host);
        driver.negotiate(refused);
        driver
    }

    /// A device after reset.
    pub(crate) fn untouched(state: D::State, host: D::Host) -> Self {
        Self::untouched_in(ram(), state, host)
    }

    /// A device after reset, in this RAM of [`RAM`] bytes.
    pub(crate) fn untouched_in(memory: Memory, state: D::State, host: D::Host) -> Self {
        let irq = Line::default();
        let ends = MmioHost { memory: memory.clone(), irq: Box::new(irq.clone()), device: host };
        let device = Mmio::from_state(&MmioState { registers: None, device: state }, ends).unwrap();
        Self { device, memory, irq, queues: vec![Rings::default(); D::QUEUES.len()], free: BUFFERS }
    }

    /// The same machine after a save and a restore of the device.
    pub(crate) fn restored(self, host: D::Host) -> Self {
        let state = self.device.save();
        let ends = MmioHost { memory: self.memory.clone(), irq: Box::new(self.irq.clone()), device: host };
        let mut device = Mmio::from_state(&state, ends).unwrap();
        device.start();
        Self { device, ..self }
    }

    pub(crate) fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        assert_eq!(self.device.write(offset, &value.to_le_bytes()), None);
    }

    /// Section 3.1.1, in order.
    pub(crate) fn negotiate(&mut self, refused: u64) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, offered & !(refused >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "features were not accepted");
        for queue in 0..D::QUEUES.len() as u32 {
            self.set_up(queue);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
    }

    fn set_up(&mut self, queue: u32) {
        self.write(0x30, queue);
        let size = self.read(0x34).min(256);
        self.write(0x38, size);
        for (register, address) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            self.write(register, queue * 0x4000 + address);
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
    }

    /// After a broken rule, or at any other time: everything from the beginning, all features accepted but `refused`.
    pub(crate) fn start_over(&mut self, refused: u64) {
        self.memory.write_slice(&[0; BUFFERS as usize], GuestAddress(0)).unwrap();
        self.queues.fill(Rings::default());
        self.negotiate(refused);
    }

    /// Buffers are placed from the beginning again, over those that were lent.
    pub(crate) fn rewind(&mut self) {
        if self.free > RAM as u64 / 2 {
            self.free = BUFFERS;
        }
    }

    /// A fresh place in guest RAM with these bytes.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> u64 {
        let at = self.free;
        self.free += (bytes.len() as u64).next_multiple_of(16);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Lends a buffer without a notification; returns its head and where each writable piece lies.
    pub(crate) fn lend(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> (u16, Vec<u64>) {
        let read: Vec<_> = readable.iter().map(|bytes| (self.place(bytes), bytes.len() as u32, 0)).collect();
        let write: Vec<_> =
            writable.iter().map(|&len| (self.place(&vec![0; len as usize]), len, WRITE)).collect();
        let places = write.iter().map(|piece| piece.0).collect();
        (self.lend_raw(queue, &[read, write].concat()), places)
    }

    /// Lends a chain of descriptors (address, length, flags) as given.
    pub(crate) fn lend_raw(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) -> u16 {
        let size = D::QUEUES[queue].min(256);
        let head = self.queues[queue].next;
        for (at, &(address, len, flags)) in pieces.iter().enumerate() {
            let index = (head + at as u16) % size;
            let last = at + 1 == pieces.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.descriptor(queue, index, address, len, flags, (index + 1) % size);
        }
        self.queues[queue].next = (head + pieces.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(queue as u64 * 0x4000 + u64::from(index) * 16);
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat();
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let size = D::QUEUES[queue].min(256);
        let ring = queue as u64 * 0x4000 + 0x1000;
        let rings = &mut self.queues[queue];
        let entry = ring + 4 + u64::from(rings.avail % size) * 2;
        rings.avail = rings.avail.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.memory.write_obj(rings.avail, GuestAddress(ring + 2)).unwrap();
    }

    pub(crate) fn notify(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// What the device has given back since last asked: heads and lengths.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let size = D::QUEUES[queue].min(256);
        let ring = queue as u64 * 0x4000 + 0x2000;
        let end: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while self.queues[queue].seen != end {
            let entry = ring + 4 + u64::from(self.queues[queue].seen % size) * 8;
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            used.push((head as u16, len));
            self.queues[queue].seen = self.queues[queue].seen.wrapping_add(1);
        }
        used
    }

    pub(crate) fn interrupts(&self) -> usize {
        self.irq.0.swap(0, Ordering::SeqCst)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 64 != 0
    }
}
