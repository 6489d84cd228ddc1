//! `device_bench [ROUNDS]`: our disk and network devices beside those of QEMU's `microvm`, in the lab.
//!
//! In: how many rounds (5 without a number). Out: a table of medians and ratios, and the same in `target/bench/devices.json`.
//! Holds: `device_bench inside ROUNDS` is the same program in the lab, and prints samples.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::ExitCode;
use vmm_tests::device_bench::{inside, outside};

const ROUNDS: u32 = 5;
const JSON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench/devices.json");

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device_bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["inside", rounds] => inside::run(number(rounds)?),
        rest => {
            let rounds = rest.first().map_or(Ok(ROUNDS), |rounds| number(rounds))?;
            let disk_speed = std::env::current_exe()?.with_file_name("disk-speed");
            ensure!(disk_speed.exists(), "no {}: build the guests first", disk_speed.display());
            println!("{}", outside::run(rounds, &disk_speed, Path::new(JSON))?);
            Ok(())
        }
    }
}

fn number(text: &str) -> Result<u32> {
    text.parse()
        .ok()
        .filter(|&rounds| rounds > 0)
        .with_context(|| format!("`{text}`: expected a number of rounds"))
}
