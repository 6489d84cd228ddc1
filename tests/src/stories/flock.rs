//! Stories of clones that one command starts.

use super::keeping::keep;
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm, text, vmm};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Instant;

/// Clones of one snapshot go on by themselves, each behind its own socket; what they take is told; one that is killed is told of.
///
/// # Errors
/// Any of this is not so.
pub fn flock(guest: &Guest, count: u32, dir: &Path) -> Result<()> {
    let (file, flock) = (dir.join("snapshot"), dir.join("flock"));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    let before = keep(guest, &mut vm, &file)?;

    let number = count.to_string();
    let words = ["restore", text(&file)?, "--clones", &number, "--api-dir", text(&flock)?];
    let mut command = std::process::Command::new(crate::vm::program());
    command.args(words);
    let mut origin = TestVm::start_other(command)?;
    let told = origin.wait_for(&format!("{count} clones; each has"))?;
    println!("{}: {told}", guest.name);
    let mut processes = Vec::new();
    for number in 1..=count {
        processes.push(goes_on(guest, before, &flock, number)?);
    }
    processes.sort_unstable();
    processes.dedup();
    ensure!(processes.len() == count as usize, "{} processes", processes.len());

    let killed = processes[0];
    // SAFETY: the process is a clone's, and its origin has not waited for it, as it has not told of its end.
    ensure!(unsafe { libc::kill(killed, libc::SIGKILL) } == 0, "cannot kill {killed}");
    origin.wait_for("ended with status 137; see")?;
    for number in 1..=count {
        // One is gone.
        let _ = ask("stop", &flock, number);
    }
    let status = origin.wait()?;
    ensure!(status == 137, "the status is {status}");
    Ok(())
}

/// A clone goes on with the next number. Returns its process.
fn goes_on(guest: &Guest, before: u64, flock: &Path, number: u32) -> Result<i32> {
    let status = ask("status", flock, number)?;
    let console = flock.join(format!("{number}.console"));
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = std::fs::read_to_string(&console)?;
        // The last line may be half a line.
        let whole: Vec<_> = said.lines().filter(|line| line.contains(guest.pulse)).collect();
        if let [first, .., _] = whole[..] {
            let beat = guest.beat(first)?;
            ensure!((before + 1..=before + 2).contains(&beat), "clone {number}: {beat} after {before}");
            break;
        }
        ensure!(Instant::now() < deadline, "clone {number} says: {said}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(status["pid"].as_i64().context("no pid")? as i32)
}

fn ask(verb: &str, flock: &Path, number: u32) -> Result<serde_json::Value> {
    let socket = flock.join(format!("{number}.api"));
    let output = vmm([verb, "--json", "--api", text(&socket)?])?;
    ensure!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}
