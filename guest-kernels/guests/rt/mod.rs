//! What the bare-metal guests share: the way up to ring 3, a console, parameters, timers, other CPUs.
//!
//! In: a machine as `vmm run` hands it over. Out: a call of the guest's `guest_main` in ring 3, where it may use ports,
//! the local APIC and all memory below 4 GiB directly. Holds: a guest that has found a fault says `FAIL …` and ends the
//! VM with status 1.
#![allow(dead_code, reason = "no guest needs all of it")]

pub mod apic;
pub mod clock;
pub mod console;
pub mod cpu;
pub mod entry;
mod memory;
pub mod params;
pub mod smp;
pub mod trap;

use core::panic::PanicInfo;

/// Prints a line on COM1.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::rt::console::line(format_args!($($text)*)) };
}

/// Prints `FAIL` and a text, and ends the VM with status 1.
#[macro_export]
macro_rules! fail {
    ($($text:tt)*) => {{
        $crate::say!("FAIL {}", format_args!($($text)*));
        $crate::rt::console::exit(1)
    }};
}

unsafe extern "Rust" {
    /// The guest.
    safe fn guest_main() -> !;
}

/// Where every CPU arrives in ring 3. `info` is the start info or the zero page, if `entered` says so.
extern "C" fn rt_main(info: *const u8, entered: u32, cpu: u32) -> ! {
    if entered == entry::ENTERED_BY_IPI {
        smp::arrived(cpu)
    }
    params::set_source(info, entered);
    apic::enable();
    guest_main()
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    fail!("{info}")
}
