//! Stories of snapshots that hold only what changed.

use super::{refused, vmm_with};
use crate::guests::Guest;
use crate::oracle;
use crate::vm::{TestVm, done, text};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// A machine that never stops is saved as a difference to what was saved of it last, again and again, once it was booted and once it was restored.
/// Each of these snapshots is the machine as it was then: it has all that a whole one of the same instant has, and the guest goes on from it.
///
/// # Errors
/// It is another machine, or the guest finds something lost.
pub fn tracked_chain(guest: &Guest, links: usize, dir: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    let first = dir.join("tracked");
    vm.ask("snapshot", &["--track", text(&first)?])?;
    let last = (1..=links).try_fold(first, |last, link| {
        let next = dir.join(format!("tracked-{link}"));
        tracked_link(&mut vm, guest, (&last, &next), link, dir)?;
        Ok::<_, anyhow::Error>(next)
    })?;
    drop(vm);
    // It is known since the last what changed, whether or not anybody watches; from the next one on only because somebody does.
    let mut vm = TestVm::restore(&last)?;
    let [one, two] = ["restored-1", "restored-2"].map(|name| dir.join(name));
    vm.wait_for(guest.proof)?;
    since(&vm, &last, &one, &["--track", "--live"])?;
    tracked_link(&mut vm, guest, (&one, &two), 1, dir)
}

/// One after `last`. The first, the last and one between are compared with whole ones; of the others half are live.
fn tracked_link(
    vm: &mut TestVm,
    guest: &Guest,
    (last, next): (&Path, &Path),
    link: usize,
    dir: &Path,
) -> Result<()> {
    vm.wait_for(guest.proof)?;
    if link % 7 == 1 {
        is_all(vm, (last, next), dir)?;
    } else {
        let summary = since(vm, last, next, [&[], &["--live"][..]][link % 2])?;
        ensure!(summary["stored_bytes"].as_u64() < summary["memory_bytes"].as_u64(), "{summary}");
    }
    TestVm::restore(next)?.wait_for(guest.proof).map(drop)
}

/// A difference of what stands still is all that a whole snapshot has. The guest goes on afterwards.
///
/// # Errors
/// It is another machine.
pub fn is_all(vm: &TestVm, (last, next): (&Path, &Path), dir: &Path) -> Result<()> {
    let [whole, flat] = ["whole", "flat"].map(|name| dir.join(name));
    vm.ask("pause", &[])?;
    since(vm, last, next, &[])?;
    vm.snapshot(&whole, "resume")?;
    done(&["flatten", text(next)?, text(&flat)?])?;
    oracle::same_machine(&flat, &whole)?;
    [whole, flat].iter().try_for_each(|file| Ok(std::fs::remove_file(file)?))
}

/// A machine is restored, runs, and is saved as a difference to what it was restored from, again and again. A chain made one has
/// all that a whole snapshot of the same instant has, and the guest goes on from the last.
///
/// # Errors
/// It is another machine, or the guest finds something lost.
pub fn chain(guest: &Guest, links: usize, dir: &Path) -> Result<()> {
    let mut last = dir.join("0");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    vm.snapshot_and_stop(&last)?;
    for link in 1..=links {
        let mut vm = TestVm::restore(&last)?;
        vm.wait_for(guest.proof)?;
        vm.ask("pause", &[])?;
        let file = dir.join(link.to_string());
        let summary = since(&vm, &last, &file, [&[], &["--live"][..]][link % 2])?;
        ensure!(summary["stored_bytes"].as_u64() < summary["memory_bytes"].as_u64(), "{summary}");
        if link == 1 || link == links {
            let [whole, flat] = ["whole", "flat"].map(|name| dir.join(name));
            vm.snapshot(&whole, "pause")?;
            done(&["flatten", text(&file)?, text(&flat)?])?;
            oracle::same_machine(&flat, &whole)?;
            done(&["verify", text(&flat)?])?;
        }
        last = file;
    }
    let needs = described(&last)?["needs"].as_array().map(Vec::len);
    ensure!(needs == Some(links), "{needs:?} snapshots are needed");
    done(&["verify", text(&last)?])?;
    let mut vm = TestVm::restore(&last)?;
    (0..2).try_for_each(|_| vm.wait_for(guest.proof).map(drop))
}

/// A snapshot that it is no difference to, or that isn't there, or that would be overwritten, is refused with its name; and so is a difference
/// where all is needed.
///
/// # Errors
/// It is not refused, or not by name.
pub fn refused_parents(guest: &Guest, dir: &Path) -> Result<()> {
    let [base, child, other] = ["base", "child", "other"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot(&base, "resume")?;
    refuses(&vm, &base, &child, &["nothing is known of what changed", "--track"])?;
    let (tracked, later) = (dir.join("tracked"), dir.join("later"));
    vm.ask("snapshot", &["--track", text(&tracked)?])?;
    refuses(&vm, &base, &child, &["is known since snapshot", &id(&tracked)?, &id(&base)?])?;
    since(&vm, &tracked, &later, &[])?;
    since(&vm, &tracked, &later.with_extension("2"), &[])?;
    refuses(&vm, &tracked, &tracked, &["which the new one would need", &id(&tracked)?])?;
    vm.snapshot_and_stop(&other)?;

    let mut vm = TestVm::restore(&base)?;
    vm.wait_for(guest.pulse)?;
    refuses(&vm, &other, &child, &["is known since snapshot", &id(&base)?, &id(&other)?])?;
    refuses(&vm, &dir.join("nothing"), &child, &[text(&dir.join("nothing"))?, "No such file"])?;
    refuses(&vm, &base, &base, &["which the new one would need", &id(&base)?])?;
    since(&vm, &base, &child, &[])?;
    vm.wait_for(guest.pulse)?;

    refused(vmm_with(["restore", "--via-stub", text(&child)?]), 1, &["needs its parent", &id(&base)?])?;
    std::fs::rename(&base, dir.join("aside"))?;
    refused(
        vmm_with(["restore", text(&child)?]),
        1,
        &[text(&child)?, "which is not there", &id(&dir.join("aside"))?],
    )?;
    ensure!(described(&child)?["broken"].is_string(), "inspect finds the chain whole");
    std::fs::rename(&other, &base)?;
    refused(vmm_with(["restore", text(&child)?]), 1, &[text(&child)?, &id(&base)?]).map(drop)
}

pub(super) fn since(vm: &TestVm, parent: &Path, file: &Path, more: &[&str]) -> Result<serde_json::Value> {
    vm.ask("snapshot", &[&["--parent", text(parent)?, text(file)?], more].concat())
}

fn refuses(vm: &TestVm, parent: &Path, file: &Path, words: &[&str]) -> Result<()> {
    let said = format!("{:#}", since(vm, parent, file, &[]).map(|_| ()).unwrap_err());
    ensure!(words.iter().all(|word| said.contains(word)), "expected {words:?}, found: {said}");
    Ok(())
}

fn id(file: &Path) -> Result<String> {
    Ok(described(file)?["generation"].as_str().context("no generation id")?.to_owned())
}

fn described(file: &Path) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&done(&["inspect", "--json", text(file)?])?)?)
}
