//! Stories of how machines end, and of what is typed to them.

use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Result, ensure};
use std::path::Path;

/// The guest ends by itself, and the process's status says how.
///
/// # Errors
/// Another status.
pub fn ends_with(guest: &Guest, expected: i32) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    let status = vm.wait()?;
    let said = vm.seen().last().cloned().unwrap_or_default();
    ensure!(status == expected, "{}: status {status}, expected {expected}; vmm said: {said}", guest.name);
    Ok(())
}

/// The guest does nothing that a device could answer, and yet its VM can be saved, goes on in another process, and is ended by a signal.
///
/// # Errors
/// Nobody hears.
pub fn is_within_reach(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("silent");
    TestVm::start(&guest.run_args())?.snapshot_and_stop(&file)?;
    let mut vm = TestVm::restore(&file)?;
    let status = vm.ask("status", &[])?;
    ensure!(status["state"] == "running", "{status}");
    vm.signal(libc::SIGTERM)?;
    let status = vm.wait()?;
    ensure!(status == 128 + libc::SIGTERM, "status {status}");
    Ok(())
}

/// All that is printed by a guest that ends by itself, and of it.
///
/// # Errors
/// It doesn't end.
pub fn last_words(guest: &Guest) -> Result<String> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait()?;
    Ok(vm.seen().join("\n"))
}

/// A line typed on the console reaches the guest; the end of standard input stops nothing.
///
/// # Errors
/// No answer, or no life after the end of input.
pub fn types_and_is_answered(guest: &Guest) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.type_line("hello there")?;
    vm.wait_for("input hello there")?;
    vm.close_stdin();
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))
}
