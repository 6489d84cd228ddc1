//! Stories of live snapshots of restored guests, of whose RAM most is copied before they stand still.

use super::incremental::since;
use super::live::{asked, child_of, ends, expect_no_trace};
use crate::guests::Guest;
use crate::oracle;
use crate::vm::{LIMIT, TestVm, text};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Output;
use std::thread::JoinHandle;
use std::time::Instant;

/// What is copied ahead of a guest that is stopped meanwhile is, byte by byte, what is saved of it then. Nobody else's snapshot comes between, and
/// what is written since can be told afterwards.
///
/// # Errors
/// Names what differs.
pub fn ahead_is_whole(guest: &Guest, dir: &Path) -> Result<()> {
    let [base, live, whole] = ["base", "live", "whole"].map(|name| dir.join(name));
    saved(guest, &base)?;
    until_caught(|| {
        let mut vm = TestVm::restore(&base)?;
        let (_, asking) = begun(&mut vm, guest, &live)?;
        vm.ask("pause", &[])?;
        let between = vm.ask("snapshot", &["--track", text(&whole)?]);
        let summary: serde_json::Value = serde_json::from_slice(&told(asking)?.stdout)?;
        let Some(refusal) = between.err().filter(|_| summary["pause_ms"].is_null()) else { return Ok(false) };
        ensure!(refusal.to_string().contains("a live snapshot is being written to"), "{refusal}");
        vm.snapshot(&whole, "pause")?;
        oracle::same_machine(&live, &whole)?;
        tracked_afterwards(&mut vm, guest, dir)?;
        let said = vm.last_lines();
        ensure!(!said.contains("not copied ahead"), "{said}");
        Ok(true)
    })
}

/// The log by which RAM was copied is gone, and another one can be had.
fn tracked_afterwards(vm: &mut TestVm, guest: &Guest, dir: &Path) -> Result<()> {
    let [first, second] = ["tracked", "since"].map(|name| dir.join(name));
    vm.ask("snapshot", &["--track", text(&first)?])?;
    vm.ask("resume", &[])?;
    vm.wait_for(guest.proof)?;
    since(vm, &first, &second, &["--live"])?;
    TestVm::restore(&second)?.wait_for(guest.proof).map(drop)
}

/// A VM that is stopped, or killed, while RAM of its guest is copied leaves no file and no process.
///
/// # Errors
/// One is left.
pub fn ahead_leaves_no_trace(guest: &Guest, dir: &Path) -> Result<()> {
    let [base, live] = ["base", "live"].map(|name| dir.join(name));
    saved(guest, &base)?;
    [false, true].into_iter().try_for_each(|kill| {
        until_caught(|| {
            let mut vm = TestVm::restore(&base)?;
            let (child, asking) = begun(&mut vm, guest, &live)?;
            match kill {
                true => vm.signal(libc::SIGKILL)?,
                false => {
                    vm.ask("stop", &[])?;
                    ensure!(vm.wait()? == 0, "vmm stop: the status is not 0");
                }
            }
            drop(told(asking)?);
            ends(child)?;
            expect_no_trace(dir, &live, kill)
        })
    })
}

/// A kernel that ends while its RAM is copied is told of at once, and the one that slept goes on.
///
/// # Errors
/// Nobody is told, or nobody goes on.
pub fn ahead_of_one_that_ends(guest: &Guest, sleeper: &Guest, dir: &Path) -> Result<()> {
    let [base, live] = ["base", "ended"].map(|name| dir.join(name));
    saved(guest, &base)?;
    until_caught(|| {
        let mut vm = TestVm::start(&sleeper.run_args())?;
        vm.wait_for(sleeper.pulse)?;
        vm.ask("switch", &["--to-snapshot", text(&base)?])?;
        let (_, asking) = begun(&mut vm, guest, &live)?;
        vm.ask("stop", &[])?;
        let answer = told(asking)?;
        vm.wait_for(sleeper.pulse)?;
        if answer.status.success() {
            std::fs::remove_file(&live)?;
            return Ok(false);
        }
        let said = String::from_utf8_lossy(&answer.stderr);
        ensure!(said.contains("the kernel that was to be saved has ended meanwhile"), "{said}");
        ensure!(!live.exists(), "a snapshot of it is there");
        vm.snapshot(&live, "resume").map(|_| true)
    })
}

/// On a busy host the copy may be done before anything comes between.
fn until_caught(mut story: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if story()? {
            return Ok(());
        }
    }
    bail!("no live snapshot could be caught while RAM was copied")
}

fn saved(guest: &Guest, file: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    vm.snapshot_and_stop(file).map(drop)
}

/// Asks for a live snapshot of it; returns as soon as there is a child that the copies are for.
fn begun(vm: &mut TestVm, guest: &Guest, file: &Path) -> Result<(i32, JoinHandle<Result<Output>>)> {
    vm.wait_for(guest.proof)?;
    let asking = asked(vm, file);
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(child) = child_of(vm.pid()) {
            return Ok((child, asking));
        }
        ensure!(!asking.is_finished(), "there was no child: {:?}", told(asking)?);
    }
    bail!("nobody begins to copy its RAM")
}

fn told(asking: JoinHandle<Result<Output>>) -> Result<Output> {
    asking.join().ok().context("whoever asked has panicked")?
}
