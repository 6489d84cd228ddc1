//! The local APIC and its timer (SDM volume 3, chapter 11).

use super::cpu::{cpuid, tsc};
use super::trap::{self, SPURIOUS, TIMER};
use core::ptr;

const BASE: usize = 0xfee0_0000;
const ID: usize = 0x20;
const SPURIOUS_VECTOR: usize = 0xf0;
const COMMAND: usize = 0x300;
const COMMAND_TARGET: usize = 0x310;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const DIVIDE: usize = 0x3e0;

const SOFTWARE_ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0b1011;
const ASSERT: u32 = 1 << 14;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;
const TSC_DEADLINE: u32 = 0x6e0;
const HAS_DEADLINE: u32 = 1 << 24;
/// KVM's local APIC counts nanoseconds (`APIC_BUS_CYCLE_NS`).
pub const HZ: u32 = 1_000_000_000;

fn read(register: usize) -> u32 {
    // SAFETY: the APIC's page is mapped; a register read has no effect on memory.
    unsafe { ptr::read_volatile((BASE + register) as *const u32) }
}

fn write(register: usize, value: u32) {
    // SAFETY: as above.
    unsafe { ptr::write_volatile((BASE + register) as *mut u32, value) }
}

/// Turns this CPU's local APIC on.
pub fn enable() {
    write(SPURIOUS_VECTOR, SOFTWARE_ENABLE | u32::from(SPURIOUS));
    write(DIVIDE, DIVIDE_BY_1);
}

/// This CPU's number.
pub fn id() -> u32 {
    read(ID) >> 24
}

/// Interrupts this CPU every `count` nanoseconds.
pub fn periodic(count: u32) {
    write(LVT_TIMER, PERIODIC | u32::from(TIMER));
    write(INITIAL_COUNT, count);
}

/// Interrupts this CPU once after `count` nanoseconds.
pub fn one_shot(count: u32) {
    write(LVT_TIMER, u32::from(TIMER));
    write(INITIAL_COUNT, count);
}

/// Whether there is a TSC-deadline timer.
pub fn has_deadline() -> bool {
    cpuid(1, 0)[2] & HAS_DEADLINE != 0
}

/// Interrupts this CPU every `cycles` of the TSC, each interrupt arming the next.
pub fn deadline(cycles: u64) {
    write(LVT_TIMER, DEADLINE | u32::from(TIMER));
    trap::set_deadline(id(), cycles);
    trap::write_msr(TSC_DEADLINE, tsc() + cycles);
}

/// Stops the timer, in whatever mode it is.
pub fn stop() {
    trap::set_deadline(id(), 0);
    write(LVT_TIMER, MASKED);
    write(INITIAL_COUNT, 0);
}

/// Sends INIT to CPU `target`.
pub fn send_init(target: u32) {
    send(target, INIT | ASSERT);
}

/// Has CPU `target` start at `page`, a page below 1 MiB.
pub fn send_start_up(target: u32, page: usize) {
    send(target, START_UP | ASSERT | (page >> 12) as u32);
}

fn send(target: u32, command: u32) {
    write(COMMAND_TARGET, target << 24);
    write(COMMAND, command);
}
