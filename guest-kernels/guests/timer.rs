//! `timer`: sees that timer interrupts keep coming and that time never goes back.
//!
//! Parameters: `period=<microseconds>` (10000), `interrupts=<n>` (10) in each round.
//! Rounds take turns: periodic, one-shot and, where CPUID has it, TSC-deadline. Prints
//! `timer round=<n> ok mode=<mode> clock=<kvmclock|tsc> now=<ns or cycles>`, for ever; ends with `FAIL …`, status 1.
#![no_std]
#![no_main]

mod rt;

use rt::{apic, clock, cpu, params, trap};

/// Time that may pass without an interrupt, in units of the period.
const PATIENCE: u64 = 1000;

#[derive(Clone, Copy)]
enum Mode {
    Periodic,
    OneShot,
    Deadline,
}

/// Two clocks, and the latest that each has said.
struct Clocks {
    has_kvmclock: bool,
    kvmclock: u64,
    tsc: u64,
}

impl Clocks {
    fn new() -> Self {
        Self { has_kvmclock: clock::enable(), kvmclock: 0, tsc: cpu::tsc() }
    }

    /// Reads both; returns the cycles since the last time.
    fn read(&mut self) -> u64 {
        let kvmclock = if self.has_kvmclock { clock::now() } else { 0 };
        let tsc = cpu::tsc();
        if kvmclock < self.kvmclock {
            fail!("timer kvmclock went back from {} to {kvmclock}", self.kvmclock);
        }
        if tsc < self.tsc {
            fail!("timer the TSC went back from {} to {tsc}", self.tsc);
        }
        let passed = tsc - self.tsc;
        (self.kvmclock, self.tsc) = (kvmclock, tsc);
        passed
    }
}

/// TSC cycles in `period` microseconds, by the local APIC.
fn cycles(period: u32) -> u64 {
    let (ticks, start) = (trap::ticks(0), cpu::tsc());
    apic::one_shot(period * 1000);
    while trap::ticks(0) == ticks {}
    (cpu::tsc() - start).max(1)
}

fn start(mode: Mode, period: u32, cycles: u64) {
    match mode {
        Mode::Periodic => apic::periodic(period * 1000),
        Mode::OneShot => apic::one_shot(period * 1000),
        Mode::Deadline => apic::deadline(cycles),
    }
}

/// Waits for an interrupt after the `seen` ones, which were counted before the timer was started: the interrupt may have
/// come by now. A long step between two looks at the clock is a time when this CPU didn't run, and counts
/// as one period only: a guest that was away for a day has not waited for a day.
fn wait(clocks: &mut Clocks, mode: Mode, cycles: u64, seen: &mut u64) {
    let mut waited = 0;
    while trap::ticks(0) == *seen {
        waited += clocks.read().min(cycles);
        if waited > PATIENCE * cycles {
            fail!("timer no interrupt in mode {} for {waited} cycles", name(mode));
        }
    }
    *seen = trap::ticks(0);
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Periodic => "periodic",
        Mode::OneShot => "one-shot",
        Mode::Deadline => "deadline",
    }
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let period = params::number("period", 10_000).clamp(1, 1_000_000) as u32;
    let (interrupts, cycles, mut clocks) = (params::number("interrupts", 10), cycles(period), Clocks::new());
    let modes: &[Mode] = &[Mode::Periodic, Mode::OneShot, Mode::Deadline];
    let modes = if apic::has_deadline() { modes } else { &modes[..2] };
    for (round, mode) in modes.iter().cycle().enumerate() {
        let mut seen = trap::ticks(0);
        start(*mode, period, cycles);
        for _ in 0..interrupts {
            wait(&mut clocks, *mode, cycles, &mut seen);
            if let Mode::OneShot = mode {
                start(*mode, period, cycles);
            }
        }
        apic::stop();
        let (clock, now) =
            if clocks.has_kvmclock { ("kvmclock", clocks.kvmclock) } else { ("tsc", clocks.tsc) };
        say!("timer round={round} ok mode={} clock={clock} now={now}", name(*mode));
    }
    unreachable!()
}
