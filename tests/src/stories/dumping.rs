//! Stories of dumps: what a debugger is given of a guest that runs, is paused, or has panicked.

use super::keeping::{follows, last_beat};
use crate::guests::Guest;
use crate::vm::{TestVm, vmm};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A guest is dumped and does not mind: one that ran runs on, one that was paused stays paused. The dump takes the place of a file,
/// is whole, and a new process goes on from it. Returns the dump of the guest that ran.
///
/// # Errors
/// The guest, or a dump, isn't as it should be.
pub fn dumped(guest: &Guest, dir: &Path) -> Result<PathBuf> {
    let [running, paused] = ["running", "paused"].map(|name| dir.join(name));
    fs::write(&running, "not a dump")?;
    let mut vm = TestVm::start(&guest.run_args())?;
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    let summary = dump(&vm, &running)?;
    ensure!(summary["pause_ms"].is_number(), "{summary}");
    ensure!(vm.ask("status", &[])?["state"] == "running", "{}: its dump stopped it", guest.name);
    (0..2).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;

    vm.ask("pause", &[])?;
    let summary = dump(&vm, &paused)?;
    ensure!(summary["pause_ms"].is_null(), "{summary}");
    ensure!(vm.ask("status", &[])?["state"] == "paused", "{}: its dump let it go on", guest.name);
    let before = last_beat(guest, &mut vm)?;
    vm.ask("resume", &[])?;
    vm.wait_for(guest.pulse)?;
    drop(vm);

    let mut restored = TestVm::restore(&paused)?;
    let after = guest.beat(&restored.wait_for(guest.pulse)?)?;
    ensure!(follows(before, after), "{}: {before} before, {after} after", guest.name);
    whole(&running)?;
    Ok(running)
}

fn dump(vm: &TestVm, file: &Path) -> Result<serde_json::Value> {
    vm.ask("dump", &[file.to_str().context("path")?])
}

fn whole(dump: &Path) -> Result<()> {
    let output = vmm(["verify", dump.to_str().context("path")?])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A guest panics, and leaves a dump; an older one stays. The process ends as it does without. Returns the dump.
///
/// # Errors
/// There is no dump, or the older one is gone, or the process ends otherwise.
pub fn dumped_by_panic(guest: &Guest, dir: &Path) -> Result<PathBuf> {
    let [older, newer] = ["dump", "dump.1"].map(|name| dir.join(name));
    fs::write(&older, "older")?;
    let wish = format!("dump={}", older.display());
    let mut vm = TestVm::start(&guest.clone().argument("--on-panic", &wish).run_args())?;
    let told = vm.wait_for("vmm: the guest's kernel panicked: dump in ")?;
    ensure!(told.contains(newer.to_str().context("path")?), "{}: {told}", guest.name);
    let status = vm.wait()?;
    ensure!(status == 3, "{}: status {status}, expected 3", guest.name);
    ensure!(fs::read(&older)? == b"older", "{}: the older dump is gone", guest.name);
    whole(&newer)?;
    Ok(newer)
}

/// The dump of a Linux guest that ran, with 2 vCPUs, is one that other people's programs read: makedumpfile finds its messages, of
/// which the first tells the kernel's release, by VMCOREINFO alone.
///
/// # Errors
/// As [`dumped`], or the messages aren't found.
pub fn makedumpfile_reads_it(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dumped(guest, dir)?;
    let json: serde_json::Value =
        serde_json::from_slice(&vmm(["inspect", "--json", file.to_str().context("path")?])?.stdout)?;
    let release = json["kernel_release"].as_str().context("inspect knows no release")?;
    let messages = messages(&file)?;
    ensure!(messages.contains(&format!("Linux version {release} ")), "{}: {messages}", guest.name);
    Ok(())
}

/// The dump of a Linux guest that panicked has the panic among its messages.
///
/// # Errors
/// As [`dumped_by_panic`], or there is no such message.
pub fn panic_is_in_the_dump(guest: &Guest, dir: &Path) -> Result<()> {
    let messages = messages(&dumped_by_panic(guest, dir)?)?;
    ensure!(messages.contains("Kernel panic - not syncing: "), "{}: {messages}", guest.name);
    Ok(())
}

/// What the kernel in a dump has said.
pub(super) fn messages(dump: &Path) -> Result<String> {
    let file = dump.with_extension("dmesg");
    let output = Command::new("makedumpfile").arg("--dump-dmesg").args([dump, &file]).output();
    let output = output.context("cannot run makedumpfile")?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "makedumpfile: {}", String::from_utf8_lossy(&said));
    Ok(String::from_utf8_lossy(&fs::read(&file)?).into_owned())
}
