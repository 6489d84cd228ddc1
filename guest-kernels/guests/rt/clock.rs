//! kvmclock: nanoseconds since boot, from a page that KVM keeps (Linux `Documentation/virt/kvm/x86/msr.rst`).

use super::cpu::{cpuid, tsc};
use super::trap::write_msr;
use core::ptr;
use core::sync::atomic::{Ordering::Acquire, fence};

const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
const HYPERVISOR: u32 = 0x4000_0000;
const HAS_CLOCK: u32 = 1 << 3;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const ENABLE: u64 = 1;

/// `pvclock_vcpu_time_info`, aligned so that it stays in one page.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
struct TimeInfo {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

static mut INFO: TimeInfo = TimeInfo {
    version: 0,
    pad: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    pad2: [0; 2],
};

/// Turns the clock on; false if KVM doesn't offer it.
pub fn enable() -> bool {
    let [_, signature @ ..] = cpuid(HYPERVISOR, 0);
    if signature != SIGNATURE || cpuid(HYPERVISOR + 1, 0)[0] & HAS_CLOCK == 0 {
        return false;
    }
    write_msr(SYSTEM_TIME, &raw const INFO as u64 | ENABLE);
    true
}

/// Nanoseconds since boot.
pub fn now() -> u64 {
    loop {
        let before = version();
        fence(Acquire);
        // SAFETY: plain data that KVM writes; a torn read is seen by the version and done again.
        let info = unsafe { ptr::read_volatile(&raw const INFO) };
        let cycles = tsc().wrapping_sub(info.tsc_timestamp);
        fence(Acquire);
        if before & 1 == 0 && before != 0 && before == version() {
            return info.system_time + scale(cycles, info);
        }
    }
}

fn version() -> u32 {
    // SAFETY: an aligned word.
    unsafe { ptr::read_volatile(&raw const INFO.version) }
}

fn scale(cycles: u64, info: TimeInfo) -> u64 {
    let shift = u32::from(info.tsc_shift.unsigned_abs());
    let shifted = if info.tsc_shift < 0 { cycles >> shift } else { cycles << shift };
    (u128::from(shifted) * u128::from(info.tsc_to_system_mul) >> 32) as u64
}
