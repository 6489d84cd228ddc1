//! A story of the memory that a guest uses first.

use super::keeping::keep;
use super::refusing::{refused, vmm_with};
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A guest that has `size` MiB in use, and works with an eighth of that. Its working set is written down and is about that eighth; a restore
/// that fetches it ahead goes on with the next number and has it in place; lists that are missing, another snapshot's, or none are refused.
///
/// # Errors
/// Any of this is not so.
pub fn works_with_a_part(guest: &Guest, size: u64, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let list = dir.join("snapshot.workingset");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    let before = keep(guest, &mut vm, &file)?;
    let prefetch = ["restore", file.to_str().context("path")?, "--prefetch"];
    refused(vmm_with(prefetch), 1, &["snapshot.workingset", "--record-working-set", "No such file"])?;

    let mut recorded = TestVm::restore_with(&file, &["--record-working-set"])?;
    let told = recorded.wait_for("of working set")?;
    println!("{}: {told}", guest.name);
    let text = fs::read_to_string(&list)?;
    let (part, bytes) = ((size << 20) / 8, listed(&text)?);
    // Some pages of code besides; on a file system in memory, where nothing can be dropped, as much again around those that are used.
    ensure!(bytes >= part && bytes < 3 * part, "{bytes} bytes of {part}: {told}");

    drop(recorded);
    let mut fetched = TestVm::restore_with(&file, &["--prefetch", "--paused"])?;
    ensure!(fetched.ask("status", &[])?["state"] == "paused", "it runs");
    let deadline = Instant::now() + LIMIT;
    while mapped(fetched.pid(), &file)? < part {
        ensure!(Instant::now() < deadline, "the working set is not put in place");
        std::thread::sleep(Duration::from_millis(5));
    }
    fetched.ask("resume", &[])?;
    let after = guest.beat(&fetched.wait_for(guest.pulse)?)?;
    ensure!((before + 1..=before + 2).contains(&after), "{after} after {before}");

    for (bad, what) in [
        (text.replace("snapshot ", "snapshot 0"), "is of snapshot 0"),
        (format!("{text}0x1 0x1000\n"), "expected whole pages"),
        (String::new(), "line 1"),
    ] {
        fs::write(&list, bad)?;
        refused(vmm_with(prefetch), 1, &["snapshot.workingset", what])?;
    }
    Ok(())
}

/// Bytes in a list.
fn listed(list: &str) -> Result<u64> {
    let length = |line: &str| -> Result<u64> {
        let (_, length) = line.split_once(" 0x").with_context(|| line.to_owned())?;
        Ok(u64::from_str_radix(length, 16)?)
    };
    list.lines().skip(2).map(length).sum()
}

/// Bytes of a file that a process has mapped, and has.
fn mapped(process: u32, file: &Path) -> Result<u64> {
    let name = file.canonicalize()?.display().to_string();
    let maps = fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let of_file = maps.lines().skip_while(|line| !line.ends_with(&name));
    let resident = of_file.filter_map(|line| line.strip_prefix("Rss:")).next().context("not mapped")?;
    Ok(resident.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
