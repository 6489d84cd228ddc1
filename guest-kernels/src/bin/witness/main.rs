//! `witness [ROUNDS]`: a Linux program that would notice if a snapshot lost something. `witness clocks` tells the time.
//!
//! In: how many rounds (for ever without a number). Out: `witness round=<n> ok` after each round, or one line
//! `witness FAIL <what>` and status 1. Holds: registers, 64 MiB of memory, a timer and the clock are alive over each
//! round, so a machine may be saved, ended and restored at any moment and a loss shows in the round that it fell into.

mod clocks;
mod memory;
mod registers;
mod time;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().skip(1).eq(["clocks"]) {
        println!("witness FAIL {}", clocks::tell());
        return ExitCode::FAILURE;
    }
    let Some(rounds) = rounds() else {
        eprintln!("usage: witness [ROUNDS] | witness clocks");
        return ExitCode::from(2);
    };
    match watch(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            println!("witness FAIL {what}");
            ExitCode::FAILURE
        }
    }
}

/// The number of rounds; `None` if the arguments say something else.
fn rounds() -> Option<u64> {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().map_or(Some(u64::MAX), |word| word.parse().ok())?;
    arguments.next().is_none().then_some(rounds)
}

fn watch(rounds: u64) -> Result<(), String> {
    let mut clock = time::Clock::default();
    let mut timer = time::Timer::start(&mut clock)?;
    let mut memory = memory::Memory::filled();
    println!("witness start registers={} memory={}MiB", registers::kind(), memory::BYTES >> 20);
    for round in 1..=rounds {
        registers::hold(round)?;
        memory.check_and_renew(round)?;
        timer.check(&mut clock)?;
        clock.check()?;
        println!("witness round={round} ok");
    }
    Ok(())
}
