//! The other CPUs: found in the MADT, started with INIT and start-up IPIs.
//!
//! In: the ACPI tables. Out: a function running on every CPU. Holds: a CPU's number is its local APIC id.

use super::entry::{MAX_CPUS, TRAMPOLINE};
use super::{apic, params};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

static MAIN: AtomicUsize = AtomicUsize::new(0);
static ARRIVED: AtomicU32 = AtomicU32::new(1);

/// Starts every other CPU in `main`, which gets the CPU's number; returns how many CPUs there are.
pub fn start(main: fn(u32) -> !) -> u32 {
    MAIN.store(main as usize, SeqCst);
    copy_trampoline();
    let cpus = count();
    for target in 1..cpus {
        apic::send_init(target);
        apic::send_start_up(target, TRAMPOLINE);
    }
    while ARRIVED.load(SeqCst) < cpus {
        core::hint::spin_loop();
    }
    cpus
}

pub(super) fn arrived(cpu: u32) -> ! {
    apic::enable();
    ARRIVED.fetch_add(1, SeqCst);
    // SAFETY: `start` has put a function of this type there before it sent the start-up IPI.
    let main: fn(u32) -> ! = unsafe { mem::transmute(MAIN.load(SeqCst)) };
    main(cpu)
}

fn copy_trampoline() {
    unsafe extern "C" {
        static rt_trampoline: u8;
        static rt_trampoline_end: u8;
    }
    let (start, end) = (&raw const rt_trampoline, &raw const rt_trampoline_end);
    // SAFETY: both symbols bound the same code, and nothing else is in the page it goes to.
    unsafe { ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, end as usize - start as usize) }
}

/// CPUs that are enabled in the MADT (ACPI 6.5, 5.2.12); 1 without ACPI.
pub fn count() -> u32 {
    const XSDT: usize = 24;
    const LENGTH: usize = 4;
    const HEADER: usize = 36;
    if params::rsdp() == 0 {
        return 1;
    }
    let xsdt = params::word(params::rsdp() + XSDT) as usize;
    let entries = (xsdt + HEADER..xsdt + params::word(xsdt + LENGTH) as usize).step_by(8);
    let tables = entries.map(|entry| params::word(entry) as usize);
    let madt = tables.filter(|&table| params::word(table) == u32::from_le_bytes(*b"APIC")).next();
    madt.map_or(1, |madt| count_local_apics(madt, params::word(madt + LENGTH) as usize))
}

fn count_local_apics(madt: usize, len: usize) -> u32 {
    const FIRST: usize = 44;
    const LOCAL_APIC: u32 = 0;
    let (mut at, mut cpus) = (madt + FIRST, 0);
    while at < madt + len {
        let (kind, size) = (params::word(at) & 0xff, params::word(at) >> 8 & 0xff);
        let enabled = params::word(at + 4) & 1;
        cpus += if kind == LOCAL_APIC { enabled } else { 0 };
        at += size.max(2) as usize;
    }
    cpus.clamp(1, MAX_CPUS as u32)
}
