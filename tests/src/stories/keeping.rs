//! Stories of machines that are kept in a file.

use crate::guests::Guest;
use crate::oracle;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Fast restart: boot, snapshot, the process ends; a new process goes on with the next number. Returns the numbers before
/// and after.
///
/// # Errors
/// The guest does not go on, or goes on elsewhere.
pub fn second_process(guest: &Guest, dir: &Path) -> Result<(u64, u64)> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    let before = keep(guest, &mut vm, &file)?;

    let mut restored = TestVm::restore(&file)?;
    let after = guest.beat(&restored.wait_for(guest.pulse)?)?;
    ensure!(follows(before, after), "{}: {before} before, {after} after", guest.name);
    for expected in after + 1..after + 4 {
        let beat = guest.beat(&restored.wait_for(guest.pulse)?)?;
        ensure!(beat == expected, "{}: {beat} where {expected} was due", guest.name);
    }
    Ok((before, after))
}

/// What a Linux guest is told to run so that it tells its boot id again and again.
pub const TELL_BOOT_ID: &str =
    "while sleep 0.2; do echo boot_id $(cat /proc/sys/kernel/random/boot_id); done";

/// The restored guest is the same boot of the same kernel.
///
/// # Errors
/// It is another, or does not go on.
pub fn same_boot(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    let ready = vm.wait_for("ready kernel=")?;
    vm.wait_for("boot_id ")?;
    vm.wait_for(guest.pulse)?;
    let before = keep(guest, &mut vm, &file)?;

    let mut restored = TestVm::restore(&file)?;
    let after = guest.beat(&restored.wait_for(guest.pulse)?)?;
    ensure!(follows(before, after), "{}: {before} before, {after} after", guest.name);
    let told = restored.wait_for("boot_id ")?;
    let boot_id = told.split("boot_id ").nth(1).unwrap_or_default();
    ensure!(boot_id.len() == 36 && ready.contains(boot_id), "\"{told}\" after \"{ready}\"");
    Ok(())
}

/// Whether a number is the next one. One line may be missing: the pause cut it in two, and each process has one end of it.
pub fn follows(before: u64, after: u64) -> bool {
    (before + 1..=before + 2).contains(&after)
}

/// Writes the machine to a file and ends its process. Returns the last number that the guest printed.
pub(super) fn keep(guest: &Guest, vm: &mut TestVm, file: &Path) -> Result<u64> {
    vm.snapshot(file, "pause")?;
    let before = last_beat(guest, vm)?;
    vm.ask("stop", &[])?;
    ensure!(vm.wait()? == 0, "vmm stop: the status is not 0");
    Ok(before)
}

/// The last number printed before a pause: output is complete when the pause is.
pub(super) fn last_beat(guest: &Guest, vm: &mut TestVm) -> Result<u64> {
    vm.lines_within(std::time::Duration::from_millis(300));
    let last = vm.seen().iter().rev().find(|line| line.contains(guest.pulse));
    guest.beat(last.context("no sign of life")?)
}

/// The oracle: a restored machine, captured before it runs, is the machine that was saved.
///
/// # Errors
/// Names what differs.
pub fn capture_again(guest: &Guest, dir: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    captured_again(vm, dir).map(drop).with_context(|| guest.name.clone())
}

/// The same with a machine that runs already. Returns the second snapshot.
pub(super) fn captured_again(vm: TestVm, dir: &Path) -> Result<PathBuf> {
    let (first, second) = (dir.join("first"), dir.join("second"));
    vm.snapshot_and_stop(&first)?;
    TestVm::restore_paused(&first)?.snapshot_and_stop(&second)?;
    oracle::same_machine(&first, &second)?;
    Ok(second)
}

/// Many rounds of restore and snapshot. Each lets the guest live for one more beat at least, and cuts it off wherever it is;
/// the guest itself looks for what was lost, and at last is let to look at everything twice.
///
/// # Errors
/// The guest finds something lost, or its number doesn't go up by one each time.
pub fn rounds(guest: &Guest, count: u32, dir: &Path) -> Result<()> {
    let files = [dir.join("even"), dir.join("odd")];
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    let mut beat = guest.beat(&vm.wait_for(guest.pulse)?)?;
    vm.snapshot_and_stop(&files[0])?;
    for round in 1..=count as usize {
        let mut vm = TestVm::restore(&files[(round + 1) % 2])?;
        let next = guest.beat(&vm.wait_for(guest.pulse)?)?;
        ensure!(next > beat, "{}: in round {round} {next} follows {beat}", guest.name);
        beat = next;
        vm.snapshot_and_stop(&files[round % 2]).with_context(|| format!("round {round}"))?;
        if round % 10 == 0 {
            println!("{}: {round} of {count} rounds, at {beat}", guest.name);
        }
    }
    let mut vm = TestVm::restore(&files[count as usize % 2])?;
    (0..2).try_for_each(|_| vm.wait_for(guest.proof).map(drop))
}
