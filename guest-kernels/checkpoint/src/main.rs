//! `vmm-checkpoint VERB`: takes a guest's processes off one kernel and puts them back on another, with CRIU.
//!
//! In: a verb, and what is in `/persist/.checkpoint`. Out: at most a line of `key=value`; a failure is one line on standard
//! error and status 1, wrong usage is status 2. Holds: from `dump` to `resume` nothing of the workload runs and no packet comes
//! in or goes out, so nothing is acknowledged that could be lost.
//!
//! ```text
//! kernel A   attach · start … pre-dump · pre-dump · dump          resume, if the change did not come about
//! kernel B                                             attach · restore --hold · resume
//! ```

mod about;
mod carry;
mod check;
mod container;
mod cpu;
mod criu;
mod disk;
mod group;
mod hold;
mod init;
mod netlink;
mod network;
mod place;
mod rehearsal;
mod steps;
mod timers;
mod tree;
mod verbs;
mod warm;

use std::process::ExitCode;

const USAGE: &str =
    "usage: vmm-checkpoint attach [--address ADDRESS/BITS [--gateway ADDRESS]] [--persist DEVICE]
       vmm-checkpoint start [--name NAME] -- COMMAND [ARGUMENT]...
       vmm-checkpoint check | pre-dump | dump | restore [--hold] | resume [--keep] | state
       vmm-checkpoint export [--stop] PID | import | continue PID | end PID";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(request) = verbs::Request::parse(&words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match request.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm-checkpoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}
