//! A story of what a restore tells of the time that it took.

use super::keeping::keep;
use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// Its times follow one another, whoever lets the guest run.
///
/// # Errors
/// One is missing, or before the one that it comes after.
pub fn tells_its_times(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    keep(guest, &mut vm, &file)?;

    let mut told = TestVm::restore_with(&file, &["--timing"])?;
    let line = told.wait_for("timing: ")?;
    ensure!(line.contains("to the first KVM_RUN") && line.contains("faults"), "vmm says: {line}");
    in_order(&mut TestVm::restore_with(&file, &["--timing=json"])?)?;
    let mut paused = TestVm::restore_with(&file, &["--timing=json", "--paused"])?;
    paused.ask("resume", &[])?;
    in_order(&mut paused)
}

/// One that sleeps has no exit, which is told, and its working set is noted all the same.
///
/// # Errors
/// It is not.
pub fn tells_of_one_that_sleeps(dir: &Path) -> Result<()> {
    let guest = Guest::bare("power", dir)?.cmdline("do=hang");
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for("power do=hang")?;
    vm.snapshot_and_stop(&file)?;
    let mut told = TestVm::restore_with(&file, &["--timing", "--record-working-set"])?;
    told.wait_for("no exit answered so far")?;
    if !vmm::working_set::path(&file).exists() {
        told.wait_for("of working set")?;
    }
    Ok(())
}

fn in_order(vm: &mut TestVm) -> Result<()> {
    let line = vm.wait_for("process_ns")?;
    // The guest may have begun a line of its own.
    let json = line.find("{\"timing").context("no JSON")?;
    let told: serde_json::Value =
        serde_json::Deserializer::from_str(&line[json..]).into_iter().next().context("JSON")??;
    let names = ["process_ns", "call_ns", "entered_ns", "answered_ns"];
    let times: Option<Vec<_>> = names.iter().map(|name| told["timing"][name].as_u64()).collect();
    let times = times.with_context(|| line.clone())?;
    ensure!(times[0] > 0 && times.is_sorted(), "{line}");
    ensure!(told["timing"]["last_fault_ns"].as_u64() > Some(times[1]), "{line}");
    ensure!(told["timing"]["faults"].as_u64() > Some(0), "{line}");
    Ok(())
}
