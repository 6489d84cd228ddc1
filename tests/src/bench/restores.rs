//! Restores of a snapshot beside the floor.
//!
//! In: a snapshot. Out: rows: from the call and from the process's start to the first instruction, to the last fault of the working
//! set, and the memory that the monitor has for itself. Holds: the monitor is a process of its own each time, as a user starts it.

use super::report::Row;
use crate::floor::Floor;
use crate::vm::program;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmm::timing;

/// What the host has left to do for a VM that has ended is none of the next one's time.
const REST: Duration = Duration::from_millis(50);

/// How long a process takes until it is called for.
const START: Duration = Duration::from_millis(2);

/// What is restored.
#[derive(Clone, Debug)]
pub struct Subject {
    /// For the table.
    pub name: String,
    /// The snapshot, of a machine with one vCPU.
    pub file: PathBuf,
    /// Whether the guest writes to a port at once, so that its first exit tells when it ran.
    pub exits_at_once: bool,
}

/// One restore, in milliseconds.
struct Restore {
    /// From the spawn to the first instruction, by the clock of who spawned it.
    spawned: f64,
    /// From the process's start, as it tells itself.
    process: f64,
    call: f64,
    last_fault: f64,
    /// MiB.
    own: f64,
}

/// So many restores and floors by turns; the last row's goal is for all that were measured.
///
/// # Errors
/// A restore fails, or tells nothing.
pub fn restores(subject: &Subject, rounds: usize) -> Result<Vec<Row>> {
    let floor = Floor::of_snapshot(&subject.file)?;
    let (mut floors, mut restores) = (Vec::new(), Vec::new());
    for _ in 0..=rounds {
        std::thread::sleep(REST);
        get_going();
        let took = if subject.exits_at_once { floor.measure()?.answered } else { floor.measure_entry()? };
        floors.push(took.as_secs_f64() * 1e3);
        std::thread::sleep(REST);
        restores.push(restore(subject)?);
    }
    // The first of each has caches to fill.
    let (floors, restores) = (&floors[1..], &restores[1..]);
    let row = |what: &str, unit: &str, of: fn(&Restore) -> f64| {
        Row::new(&format!("{}: {what}", subject.name), unit, restores.iter().map(of).collect())
    };
    Ok(vec![
        row("restore, call to first instruction", "ms", |r| r.call).beside(floors).goal(1.3),
        row("restore, process start to first instruction", "ms", |r| r.process).beside(floors).goal(3.0),
        row("the same, by the clock of who spawned it", "ms", |r| r.spawned).beside(floors),
        row("restore, call to last fault of the working set", "ms", |r| r.last_fault).beside(floors),
        row("memory of the monitor beside guest RAM", "MiB", |r| r.own).goal(5.0),
    ])
}

/// The processor of a restore has been at work for as long when it is called for.
fn get_going() {
    let begun = Instant::now();
    while begun.elapsed() < START {
        std::hint::spin_loop();
    }
}

fn restore(subject: &Subject) -> Result<Restore> {
    let spawned_at = timing::now();
    let mut vmm = Command::new(program());
    vmm.arg("restore").arg(&subject.file).arg("--timing=json");
    let mut vmm = Killed(vmm.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let mut line = String::new();
    let said = vmm.0.stderr.take().context("no standard error")?;
    BufReader::new(said).read_line(&mut line)?;
    let told: serde_json::Value =
        serde_json::from_str(&line).with_context(|| format!("vmm said: {}", line.trim()))?;
    let at = |name: &str| told["timing"][name].as_u64().with_context(|| format!("no {name} in {told}"));
    let first = if subject.exits_at_once { at("answered_ns")? } else { at("entered_ns")? };
    // Linux finds new memory to touch for as long as it is watched.
    let settled = told["timing"]["settled"] == true || !subject.exits_at_once;
    ensure!(settled, "the guest goes on touching new memory: {told}");
    let since = |start: u64, end: u64| end.saturating_sub(start) as f64 / 1e6;
    let call = at("call_ns")?;
    Ok(Restore {
        spawned: since(spawned_at, first),
        process: since(at("process_ns")?, first),
        call: since(call, first),
        last_fault: since(call, at("last_fault_ns")?),
        own: own_memory(vmm.0.id(), &subject.file)? as f64 / f64::from(1 << 20),
    })
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Resident bytes of a process, but for what is mapped from its guest's snapshot.
fn own_memory(pid: u32, snapshot: &Path) -> Result<u64> {
    let snapshot = snapshot.canonicalize()?.display().to_string();
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut guest, mut kib) = (false, 0);
    for line in maps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            guest = line.ends_with(&snapshot);
        } else if first == "Rss:" && !guest {
            kib += line.split_ascii_whitespace().nth(1).context("Rss:")?.parse::<u64>()?;
        }
    }
    Ok(kib << 10)
}
