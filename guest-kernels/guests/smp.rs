//! `smp`: starts every CPU of the MADT, and sees that all of them go on counting and having timer interrupts.
//!
//! Parameters: `lines=<per second>` (5).
//! Prints `smp cpus=<n> round=<n> counts=<c0>,<c1>,… ticks=<t0>,<t1>,…`, for ever; ends with `FAIL …`, status 1.
#![no_std]
#![no_main]

mod rt;

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use rt::entry::MAX_CPUS;
use rt::{apic, cpu, params, smp, trap};

/// Timer interrupts per second, on each CPU.
const HZ: u64 = 100;
/// A CPU may stand still for so many interrupts of CPU 0: the host may have fewer CPUs.
const PATIENCE: u64 = 10 * HZ;

static COUNTS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Counts for ever. A CPU's own TSC must not go back.
fn count(cpu: u32) -> ! {
    apic::periodic(apic::HZ / HZ as u32);
    let mut last = 0;
    loop {
        COUNTS[cpu as usize].fetch_add(1, Relaxed);
        let tsc = cpu::tsc();
        if tsc < last {
            fail!("smp cpu {cpu}: the TSC went back from {last} to {tsc}");
        }
        last = tsc;
        core::hint::spin_loop();
    }
}

/// A row of numbers, one for each CPU.
struct Row([u64; MAX_CPUS], usize);

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0[0])?;
        self.0[1..self.1].iter().try_for_each(|number| write!(f, ",{number}"))
    }
}

fn row(cpus: u32, number: impl Fn(usize) -> u64) -> Row {
    let mut row = Row([0; MAX_CPUS], cpus as usize);
    (0..cpus as usize).for_each(|cpu| row.0[cpu] = number(cpu));
    row
}

/// What a CPU had reached, and when that was seen.
#[derive(Clone, Copy, Default)]
struct Seen {
    count: u64,
    ticks: u64,
    at: u64,
}

fn look(seen: &mut Seen, cpu: u32, now: u64) {
    let (count, ticks) = (COUNTS[cpu as usize].load(Relaxed), trap::ticks(cpu));
    if count < seen.count || ticks < seen.ticks {
        fail!("smp cpu {cpu} went back to count {count}, ticks {ticks}");
    }
    if count > seen.count && ticks > seen.ticks {
        *seen = Seen { count, ticks, at: now };
    } else if now - seen.at > PATIENCE {
        fail!("smp cpu {cpu} stands still at count {count}, ticks {ticks}");
    }
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let (cpus, lines) = (smp::start(count), params::number("lines", 5).clamp(1, HZ));
    apic::periodic(apic::HZ / HZ as u32);
    let (mut seen, mut round, mut next_line) = ([Seen::default(); MAX_CPUS], 0, 0);
    loop {
        COUNTS[0].fetch_add(1, Relaxed);
        let now = trap::ticks(0);
        if now < next_line {
            continue;
        }
        (0..cpus).for_each(|cpu| look(&mut seen[cpu as usize], cpu, now));
        let (counts, ticks) = (row(cpus, |cpu| seen[cpu].count), row(cpus, |cpu| seen[cpu].ticks));
        say!("smp cpus={cpus} round={round} counts={counts} ticks={ticks}");
        (round, next_line) = (round + 1, now + HZ / lines);
    }
}
