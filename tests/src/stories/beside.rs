//! The story of a kernel that boots beside another, and takes over its machine on trial.

use super::switching::{Life, switch_with};
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Boots it beside the one that runs.
fn prepare(vm: &TestVm, guest: &Guest) -> Result<serde_json::Value> {
    let args = [guest.switch_args(), words(&["--share-disks"])].concat();
    vm.ask("prepare", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The one line that a verb is refused with, by the word that is in it.
fn refused(vm: &TestVm, verb: &str, args: &[&str], word: &str) -> Result<()> {
    let said = vm.ask(verb, args).err().with_context(|| format!("{verb} is not refused"))?.to_string();
    ensure!(said.contains(word) && said.trim().lines().count() == 1, "expected {word}: {said}");
    Ok(())
}

/// A kernel boots beside another and takes over the machine on trial. Left, there is nothing of it; accepted, the two take turns. A
/// kernel that was made ready once serves again from a file.
///
/// # Errors
/// Somebody doesn't go on, or the VM can be asked for what a trial has no place for.
pub fn boots_beside(guest: &Guest, other: &Guest, dir: &Path) -> Result<()> {
    let (disk, file) = (dir.join("disk"), dir.join("ready"));
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let guest = guest.clone().argument("--disk", &format!("{},id=data", disk.display()));
    let mut vm = TestVm::start(&guest.run_args())?;
    let (mut own, mut life) = (Life::of(&guest), Life::of(other));
    own.goes_on(&mut vm)?;
    refused(&vm, "accept", &[], "is not on trial")?;

    let told = prepare(&vm, other)?;
    ensure!(told["beside"] == true && told["name"] == other.word(), "{told}");
    refused(&vm, "prepare", &["--kernel", &other.kernel().display().to_string()], "runs beside already")?;
    own.goes_on(&mut vm).context("with another beside")?;
    let (word, file) = (other.word(), file.display().to_string());
    vm.ask("snapshot", &["--kernel", &word, &file])?;
    let to = words(&["--to", &word, "--trial"]);
    switch_with(&mut vm, other, &to)?;
    life.goes_on(&mut vm).context("on trial")?;
    refused(&vm, "snapshot", &[&dir.join("no").display().to_string()], "is on trial")?;
    refused(&vm, "switch", &["--kernel", &other.kernel().display().to_string()], "is on trial")?;
    refused(&vm, "forget", &[&guest.word()], "is on trial")?;
    vm.ask("switch", &["--to", &guest.word()])?;
    vm.wait_for("ended on trial, nothing of it is left")?;
    own.goes_on(&mut vm).context("after a trial")?;
    refused(&vm, "switch", &["--to", &word], "none does")?;

    let kept = words(&["--to-snapshot", &file, "--share-disks", "--as", &word, "--trial"]);
    switch_with(&mut vm, other, &kept)?;
    Life::of(other).goes_on(&mut vm).context("out of its file")?;
    vm.ask("accept", &[])?;
    switch_with(&mut vm, &guest, &words(&["--to", &guest.word()])).context("nobody wrote the disk")?;
    own.goes_on(&mut vm)?;
    refused(&vm, "switch", &["--to", &word, "--trial"], "has run here before")?;
    switch_with(&mut vm, other, &words(&["--to", &word]))?;
    life = Life::of(other);
    life.goes_on(&mut vm).context("after its acceptance")
}

/// A kernel that ends, beside or on trial, leaves the machine to who had it, and says how it ended.
///
/// # Errors
/// The other doesn't go on, or nobody is told.
pub fn ends_beside(guest: &Guest, other: &Guest, dir: &Path) -> Result<()> {
    let disk = dir.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let guest = guest.clone().argument("--disk", &format!("{},id=data", disk.display()));
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut own = Life::of(&guest);
    own.goes_on(&mut vm)?;
    prepare(&vm, other)?;
    let deadline = Instant::now() + LIMIT;
    let why = loop {
        ensure!(Instant::now() < deadline, "the kernel beside does not end");
        let told = vm.ask("kernels", &[])?;
        if let Some(why) = told["kernels"][1]["ended"].as_str() {
            break why.to_owned();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    ensure!(why.contains("panicked"), "{why}");
    refused(&vm, "switch", &["--to", &other.word()], "panicked")?;
    own.goes_on(&mut vm).context("after the end of the other")?;
    vm.ask("forget", &[&other.word()])?;

    let args = [other.switch_args(), words(&["--share-disks", "--trial"])].concat();
    vm.ask("switch", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    vm.wait_for("goes on")?;
    own.goes_on(&mut vm).context("after the end of a trial")
}
