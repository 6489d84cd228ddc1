//! Stories of snapshots that are written behind a guest that runs on.

use super::keeping::last_beat;
use crate::guests::Guest;
use crate::oracle;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::Output;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long guests stood still, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Pauses {
    /// For a live snapshot of a guest that was booted.
    pub booted: f64,
    /// For one of a guest that was restored.
    pub restored: f64,
    /// For a snapshot that is no live one.
    pub whole: f64,
}

/// A guest is saved as it runs, after its boot and after a restore. It runs on both times, and what was saved goes on as well.
///
/// # Errors
/// One of them has lost something, or stands still.
pub fn live(guest: &Guest, dir: &Path) -> Result<Pauses> {
    let [first, second, whole] = ["first", "second", "whole"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    let booted = saved_live(guest, &mut vm, &first)?;
    let whole = vm.snapshot(&whole, "resume")?["pause_ms"].as_f64().context("no pause")?;
    drop(vm);

    let mut vm = goes_on(guest, &first).context("the one that was saved after its boot")?;
    let restored = saved_live(guest, &mut vm, &second)?;
    drop(vm);
    goes_on(guest, &second).context("the one that was saved after a restore")?;
    Ok(Pauses { booted, restored, whole })
}

/// Returns for how long it stood still.
fn saved_live(guest: &Guest, vm: &mut TestVm, file: &Path) -> Result<f64> {
    let path = file.to_str().context("path")?;
    let before = guest.beat(&vm.wait_for(guest.pulse)?)?;
    let summary = vm.ask("snapshot", &[path, "--live"])?;
    let [pause, total] = ["pause_ms", "total_ms"].map(|name| summary[name].as_f64().unwrap_or(f64::MAX));
    ensure!(pause < total, "{}: stood still for all of it: {summary}", guest.name);
    (0..2).try_for_each(|_| vm.wait_for(guest.proof).map(drop))?;
    let after = guest.beat(&vm.wait_for(guest.pulse)?)?;
    ensure!(after > before, "{}: {after} follows {before}", guest.name);
    Ok(pause)
}

fn goes_on(guest: &Guest, file: &Path) -> Result<TestVm> {
    let mut vm = TestVm::restore(file)?;
    (0..2).try_for_each(|_| vm.wait_for(guest.proof).map(drop))?;
    Ok(vm)
}

/// Of a machine that stands still, a live snapshot and another are the same, byte by byte; and it still stands still.
///
/// # Errors
/// Names what differs.
pub fn live_is_whole(guest: &Guest, dir: &Path) -> Result<()> {
    let [live, whole] = ["live", "whole"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    vm.ask("pause", &[])?;
    let summary = vm.ask("snapshot", &[live.to_str().context("path")?, "--live"])?;
    ensure!(summary["pause_ms"].is_null(), "it went on: {summary}");
    let beat = last_beat(guest, &mut vm)?;
    vm.snapshot(&whole, "pause")?;
    ensure!(last_beat(guest, &mut vm)? == beat, "{}: did not stand still", guest.name);
    oracle::same_machine(&live, &whole)
}

/// A live snapshot under way has the machine make no other, and goes without a trace when the VM is stopped, or killed.
///
/// # Errors
/// A file or a process is left, or another snapshot is begun.
pub fn live_leaves_no_trace(guest: &Guest, dir: &Path) -> Result<()> {
    for kill in [false, true] {
        let deadline = Instant::now() + LIMIT;
        // On a busy host one may be whole, but for its sync, before it is caught.
        while !given_up(guest, dir, kill)? {
            ensure!(Instant::now() < deadline, "every live snapshot was whole before it was caught");
        }
    }
    Ok(())
}

/// Whether it was: one that became whole in spite of all is removed.
fn given_up(guest: &Guest, dir: &Path, kill: bool) -> Result<bool> {
    let [file, other] = ["snapshot", "other"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    let (child, asking) = caught(&vm, &file)?;
    if let Err(refusal) = vm.snapshot(&other, "resume") {
        let refusal = format!("{refusal:#}");
        ensure!(refusal.contains("a live snapshot is being written to"), "refused with: {refusal}");
    }
    match kill {
        true => vm.signal(libc::SIGKILL)?,
        false => {
            vm.ask("stop", &[])?;
            ensure!(vm.wait()? == 0, "vmm stop: the status is not 0");
        }
    }
    let _ = asking.join();
    ends(child)?;
    if !expect_no_trace(dir, &file, kill)? {
        let _ = fs::remove_file(&other);
        return Ok(false);
    }
    ensure!(!other.exists(), "another one is there");
    Ok(true)
}

/// Nothing is left of a live snapshot; `false` if it has become whole, and was removed.
pub(super) fn expect_no_trace(dir: &Path, file: &Path, kill: bool) -> Result<bool> {
    if file.exists() {
        let verified = crate::vm::vmm(["verify", file.to_str().context("path")?])?;
        ensure!(verified.status.success(), "half a file has the snapshot's name");
        fs::remove_file(file)?;
        return Ok(false);
    }
    let unfinished = |name: &str| name.starts_with(snapshot::publish::TEMPORARY);
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(kill || !unfinished(&name), "{name} was left behind");
    }
    Ok(true)
}

/// Asks for a live snapshot and stops the child that has the RAM before it is whole, so that it can't become whole.
fn caught(vm: &TestVm, file: &Path) -> Result<(i32, JoinHandle<Result<Output>>)> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let asking = asked(vm, file);
        while !asking.is_finished() {
            let Some(child) = child_of(vm.pid()).filter(|child| is_deaf(*child)) else { continue };
            // SAFETY: at worst it has ended, and nobody is sent the signal.
            unsafe { libc::kill(child, libc::SIGSTOP) };
            // It may have given its word before it was stopped; then the snapshot becomes whole.
            std::thread::sleep(Duration::from_millis(500));
            if !asking.is_finished() {
                return Ok((child, asking));
            }
        }
        let _ = fs::remove_file(file);
    }
    bail!("no live snapshot could be caught under way")
}

/// Somebody who waits for a live snapshot.
pub(super) fn asked(vm: &TestVm, file: &Path) -> JoinHandle<Result<Output>> {
    let (socket, file) = (vm.socket().display().to_string(), file.display().to_string());
    std::thread::spawn(move || crate::vm::vmm(["snapshot", "--json", "--api", &socket, &file, "--live"]))
}

pub(super) fn child_of(process: u32) -> Option<i32> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).ok()?.flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    children.collect::<String>().split_whitespace().next()?.parse().ok()
}

/// Whether it blocks all signals, before which it has seen to it that it ends with its parent.
fn is_deaf(process: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    let blocked = blocked.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    blocked.is_some_and(|mask| mask & (1 << (libc::SIGUSR2 - 1)) != 0)
}

pub(super) fn ends(process: i32) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let stat = || fs::read_to_string(format!("/proc/{process}/stat"));
    // One that nobody has waited for yet is a zombie.
    while stat().is_ok_and(|stat| !stat.contains(") Z ")) {
        ensure!(Instant::now() < deadline, "the process that had the RAM is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
