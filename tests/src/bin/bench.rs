//! `bench`: how long a restore takes, beside a boot, in one run on this machine's `/dev/kvm`.
//!
//! In: nothing. Out: medians, from the start of a process to the guest's first line; the restore stub's rate. Holds: both start the
//! same counter guest with 256 MiB, by turns, so that what else the machine does slows both.

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use vmm_tests::figures::median;
use vmm_tests::guests::Guest;
use vmm_tests::stories;
use vmm_tests::vm::{LIMIT, TestVm};

const ROUNDS: usize = 20;
const MEMORY: &str = "256M";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let dir = tempfile::tempdir().context("no directory for the snapshot")?;
    // 1000 lines a second: no restore waits long for the guest's next one.
    let guest = Guest::bare("counter", dir.path())?.memory(MEMORY).cmdline("rate=1000");
    let file = dir.path().join("snapshot");
    save(&guest, &file)?;
    let (mut boots, mut restores) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        boots.push(first_line(&guest.run_args())?);
        restores.push(first_line(&["restore".to_owned(), file.display().to_string()])?);
    }
    println!("{ROUNDS} rounds, {MEMORY}, from the start of the process to the guest's first line\n");
    println!("{}", table(boots, restores).context("no rounds")?);
    println!("\nSwitches between two resident kernels beside the floor, medians:\n");
    for (memory, bytes) in [("512M", 512 << 20), ("4G", 4 << 30)] {
        let guests = [guest.clone().memory(memory), Guest::bare("timer", dir.path())?.memory(memory)];
        let (switch, floor, ratio) = stories::switch_cost([&guests[0], &guests[1]], bytes, ROUNDS)?
            .medians()
            .context("no switches")?;
        println!("{memory}: switch {switch:.2} ms, floor {floor:.2} ms, ratio {ratio:.2}");
    }
    println!("\nThe restore stub beside the host's memcpy, medians:\n");
    stories::stub_rate(&Guest::bare("dirty", dir.path())?.cmdline("size=96"), dir.path())
}

fn save(guest: &Guest, file: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(file).map(drop)
}

/// In milliseconds.
fn first_line(args: &[String]) -> Result<f64> {
    let began = Instant::now();
    TestVm::start(args)?.next_line(began + LIMIT)?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

fn table(boots: Vec<f64>, restores: Vec<f64>) -> Option<Table> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["", "median ms", "best ms", "worst ms"]);
    let ms = |time: f64| format!("{time:.2}");
    for (name, times) in [("boot", &boots), ("restore", &restores)] {
        let best = times.iter().copied().fold(f64::INFINITY, f64::min);
        let worst = times.iter().copied().fold(0.0, f64::max);
        table.add_row([name.to_owned(), ms(median(times.clone())?), ms(best), ms(worst)]);
    }
    let ratio = median(boots)? / median(restores)?;
    table.add_row(["boot/restore".to_owned(), format!("{ratio:.2}"), String::new(), String::new()]);
    Some(table)
}
