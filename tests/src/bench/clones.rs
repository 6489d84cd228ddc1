//! What memory one more clone of a running flock takes.
//!
//! In: a snapshot. Out: two rows: by what the host counts for the processes, and by what it has left. Holds: a page that clones share
//! counts once; the flock is large against what the first clone alone brings in.

use super::report::Row;
use crate::vm::{TestVm, program};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

const FEW: u32 = 2;
const MANY: u32 = 52;
const ROUNDS: usize = 3;

/// A flock's memory, in KiB.
struct Taken {
    by_processes: f64,
    left: f64,
}

/// Measures it.
///
/// # Errors
/// Clones don't start, or the host doesn't tell of their memory.
pub fn clones(name: &str, file: &Path) -> Result<Vec<Row>> {
    let (mut processes, mut host) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (few, many) = (flock(file, FEW)?, flock(file, MANY)?);
        let one_more = |few: f64, many: f64| (many - few) / f64::from(MANY - FEW) / 1024.0;
        processes.push(one_more(few.by_processes, many.by_processes));
        host.push(one_more(-few.left, -many.left));
    }
    let row = |what: &str, samples| Row::new(&format!("{name}: {what}"), "MiB", samples);
    Ok(vec![
        row("one more idle clone, its processes and page tables", processes).goal(3.0),
        row("one more idle clone, by the memory that the host has left", host),
    ])
}

fn flock(file: &Path, count: u32) -> Result<Taken> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(program());
    command.arg("restore").arg(file).args(["-n", &count.to_string(), "--api-dir"]).arg(dir.path());
    let mut origin = TestVm::start_other(command)?;
    origin.wait_for("clones; each has")?;
    let id = origin.pid();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    let mut by_processes = 0.0;
    for child in children.split_ascii_whitespace() {
        by_processes += kib(&format!("/proc/{child}/smaps_rollup"), "Pss:")?;
        by_processes += kib(&format!("/proc/{child}/status"), "VmPTE:")?;
    }
    Ok(Taken { by_processes, left: kib("/proc/meminfo", "MemAvailable:")? })
}

fn kib(file: &str, name: &str) -> Result<f64> {
    let text = fs::read_to_string(file).with_context(|| file.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.split_ascii_whitespace().next());
    Ok(value.with_context(|| format!("no {name} in {file}"))?.parse()?)
}
