//! `counter`: counts in RAM and says so.
//!
//! Parameters: `rate=<lines per second>` (5), timed by the local APIC; `rate=0` has no timer and prints after every
//! `every=<increments>` (100000000).
//! Prints `tick <n>`, n from 0, for ever.
#![no_std]
#![no_main]

mod rt;

use core::ptr;
use rt::{apic, params, trap};

/// What a test may look for in guest RAM.
static mut COUNTER: u64 = 0;

fn count() -> u64 {
    let counter = &raw mut COUNTER;
    // SAFETY: this is the only CPU, and no handler uses the counter.
    unsafe {
        ptr::write_volatile(counter, ptr::read_volatile(counter) + 1);
        ptr::read_volatile(counter)
    }
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let (rate, every) = (params::number("rate", 5), params::number("every", 100_000_000).max(1));
    if rate > 0 {
        apic::periodic((u64::from(apic::HZ) / rate).max(1) as u32);
    }
    let (mut line, mut seen) = (0_u64, 0);
    loop {
        let counter = count();
        let due = if rate > 0 { trap::ticks(0) > seen } else { counter % every == 0 };
        if due {
            say!("tick {line}");
            (line, seen) = (line + 1, trap::ticks(0));
        }
    }
}
