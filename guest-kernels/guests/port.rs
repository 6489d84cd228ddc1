//! `port`: does nothing but write to a port, so that it exits as soon as it runs.
//!
//! Parameters: none.
//! Prints `port round=0 ok` once, and then writes to port 0x80, where nothing is, for ever.
#![no_std]
#![no_main]

mod rt;

use rt::cpu;

const NOTHING_THERE: u16 = 0x80;

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    say!("port round=0 ok");
    loop {
        cpu::out8(NOTHING_THERE, 1);
    }
}
