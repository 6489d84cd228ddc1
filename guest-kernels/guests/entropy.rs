//! `entropy`: has a virtio entropy device fill a buffer again and again, by a driver of its own.
//!
//! Parameters: `slot=<n>` (0), the device's window; `buffer=<MiB>` (17), where the bytes go; `rate=<buffers per second>` (20);
//! `look=0` leaves the bytes themselves alone. Prints `entropy round=<n> ok`, for ever; ends with `FAIL …`, status 1.
//! The driver waits by looking at the used ring: no interrupt is needed, and a machine saved while it waits loses nothing.
//!
//! Sources: virtio 1.2, sections 2.7 (split queues), 3.1 (initialization), 4.2.2 (MMIO registers), 5.4 (entropy device).
#![no_std]
#![no_main]

mod rt;

use core::ptr;
use core::sync::atomic::{Ordering, fence};
use rt::{apic, params, trap};

const WINDOWS: usize = 0xd000_0000;
const WINDOW_SIZE: usize = 0x1000;
// Registers.
const MAGIC: usize = 0x00;
const VERSION: usize = 0x04;
const DEVICE: usize = 0x08;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SEL: usize = 0x24;
const QUEUE_SEL: usize = 0x30;
const QUEUE_NUM: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const QUEUE_DESC: usize = 0x80;
const QUEUE_DRIVER: usize = 0x90;
const QUEUE_DEVICE: usize = 0xa0;
// Status bits.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
/// VIRTIO_F_VERSION_1 is feature 32: the lowest bit of the second half.
const VERSION_1: u32 = 1;
const ENTROPY: u32 = 4;
/// The device writes the buffer.
const WRITE: u16 = 2;

/// Entries of the queue.
const ENTRIES: u16 = 2;
const DESCRIPTORS: usize = 16 << 20;
const AVAILABLE: usize = DESCRIPTORS + 0x1000;
const USED: usize = DESCRIPTORS + 0x2000;
const BYTES: usize = 32;
/// Timer interrupts per second.
const HZ: u64 = 100;

fn get<T: Copy>(address: usize) -> T {
    // SAFETY: a register, or RAM that `guest_main` has checked; neither is a Rust object, and any bits are a number.
    unsafe { ptr::read_volatile(address as *const T) }
}

fn set<T>(address: usize, value: T) {
    // SAFETY: as above.
    unsafe { ptr::write_volatile(address as *mut T, value) }
}

/// The device, found and ready, with its one queue.
struct Device {
    window: usize,
    buffer: usize,
    asked: u16,
}

impl Device {
    fn new(window: usize, buffer: usize) -> Self {
        let found: (u32, u32, u32) = (get(window + MAGIC), get(window + VERSION), get(window + DEVICE));
        if found != (u32::from_le_bytes(*b"virt"), 2, ENTROPY) {
            fail!("entropy no device at {window:#x}: {found:x?}");
        }
        let device = Self { window, buffer, asked: 0 };
        device.negotiate();
        device.give_queue();
        device.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        device
    }

    fn write(&self, register: usize, value: u32) {
        set(self.window + register, value);
    }

    fn negotiate(&self) {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, VERSION_1);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if get::<u32>(self.window + STATUS) & FEATURES_OK == 0 {
            fail!("entropy the device refuses its features");
        }
    }

    /// All addresses are below 4 GiB, and the upper halves are zero after a reset.
    fn give_queue(&self) {
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_NUM, u32::from(ENTRIES));
        self.write(QUEUE_DESC, DESCRIPTORS as u32);
        self.write(QUEUE_DRIVER, AVAILABLE as u32);
        self.write(QUEUE_DEVICE, USED as u32);
        self.write(QUEUE_READY, 1);
        // The one descriptor: address, length, flags, next.
        set(DESCRIPTORS, self.buffer as u64);
        set(DESCRIPTORS + 8, BYTES as u32);
        set(DESCRIPTORS + 12, WRITE);
        set(DESCRIPTORS + 14, 0_u16);
    }

    /// Lends the buffer, and waits until it has come back.
    fn fill(&mut self) {
        set(AVAILABLE + 4 + 2 * usize::from(self.asked % ENTRIES), 0_u16);
        self.asked = self.asked.wrapping_add(1);
        fence(Ordering::SeqCst);
        set(AVAILABLE + 2, self.asked);
        fence(Ordering::SeqCst);
        self.write(QUEUE_NOTIFY, 0);
        while get::<u16>(USED + 2) != self.asked {
            trap::halt();
            if get::<u32>(self.window + STATUS) & NEEDS_RESET != 0 {
                fail!("entropy the device needs a reset");
            }
        }
        let used = USED + 4 + 8 * usize::from(self.asked.wrapping_sub(1) % ENTRIES);
        if (get::<u32>(used), get::<u32>(used + 4)) != (0, BYTES as u32) {
            fail!("entropy descriptor {} came back with {} bytes", get::<u32>(used), get::<u32>(used + 4));
        }
    }
}

/// Where the buffer is, if there is RAM.
fn buffer() -> usize {
    let buffer = params::number("buffer", 17) << 20;
    if buffer <= DESCRIPTORS as u64 || buffer + BYTES as u64 > params::ram_end() {
        fail!("entropy buffer={}: no RAM, or not above 16 MiB", buffer >> 20);
    }
    buffer as usize
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let slot = params::number("slot", 0) as usize;
    let (rate, look) = (params::number("rate", 20).clamp(1, HZ), params::number("look", 1) != 0);
    apic::periodic(apic::HZ / HZ as u32);
    let mut device = Device::new(WINDOWS + slot * WINDOW_SIZE, buffer());
    let (mut last, mut next) = ([0; BYTES], trap::ticks(0));
    for round in 0_u64.. {
        device.fill();
        if look {
            let bytes: [u8; BYTES] = get(device.buffer);
            if bytes == last {
                fail!("entropy round={round}: the same bytes again, {bytes:x?}");
            }
            last = bytes;
        }
        say!("entropy round={round} ok");
        next += HZ / rate;
        while trap::ticks(0) < next {
            trap::halt();
        }
    }
    unreachable!()
}
