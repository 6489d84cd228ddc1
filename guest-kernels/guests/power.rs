//! `power`: ends the machine in the way that is asked for.
//!
//! Parameters: `do=<off|reset|i8042|panic|exit|fault|hang>` (off), `status=<n>` (0) for `exit`,
//! `after=<milliseconds>` (0).
//! Prints `power do=<way>` first. A machine that goes on ends with `FAIL …`, status 1, after a second.
#![no_std]
#![no_main]

mod rt;

use rt::{apic, console, cpu, params, trap};

// The machine's ports; vmm/src/layout.rs has the map.
const ACPI_SLEEP: u16 = 0x600;
const SLEEP_S5: u8 = 5 << 2 | 1 << 5;
const ACPI_RESET: u16 = 0x602;
const RESET: u8 = 1;
const I8042_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;

fn wait(milliseconds: u64) {
    const HZ: u64 = 1000;
    let start = trap::ticks(0);
    apic::periodic(apic::HZ / HZ as u32);
    while trap::ticks(0) - start < milliseconds {
        trap::halt();
    }
    apic::stop();
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let way = params::text("do").unwrap_or("off");
    let status = params::number("status", 0) as u8;
    wait(params::number("after", 0));
    say!("power do={way}");
    match way {
        "off" => cpu::out8(ACPI_SLEEP, SLEEP_S5),
        "reset" => cpu::out8(ACPI_RESET, RESET),
        "i8042" => cpu::out8(I8042_COMMAND, PULSE_RESET),
        "panic" => cpu::out8(PANIC, PANICKED),
        "exit" => console::exit(status),
        "fault" => trap::triple_fault(),
        "hang" => wait(u64::MAX),
        _ => fail!("power do={way}: expected off, reset, i8042, panic, exit, fault or hang"),
    }
    wait(1000);
    fail!("power do={way} did not end the machine")
}
