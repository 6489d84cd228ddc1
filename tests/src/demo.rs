//! The demonstration: stock kernels are booted in turn in one process, kept in files, and go on, there and in other processes.
//!
//! In: guests whose consoles have ticks and their boot ids. Out: what was measured, told line by line as it happens. Holds: it
//! fails unless each counter goes on with the next number, each time, and the boot id is the same.

use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a guest runs beside its ticks. It starts no process but `sleep`, so that it costs little.
pub const SAYS_BOOT_ID: &str =
    "while read -r id </proc/sys/kernel/random/boot_id; do echo boot_id $id; sleep 0.1; done";
const MIB: u64 = 1 << 20;

/// A kernel that was booted and saved, and stands still at the time.
struct Saved<'a> {
    guest: &'a Guest,
    file: PathBuf,
    /// What it said that it is, its boot id included.
    ready: String,
    /// From the request to `ready`.
    boot: Duration,
    /// Bytes of guest RAM.
    memory: u64,
    /// Milliseconds from the request to the file on disk.
    snapshot_ms: f64,
    console: Console,
}

/// What a guest has said before it was cut off.
#[derive(Default)]
struct Console {
    whole: Vec<String>,
    /// The beginning of the line that it was saying, often empty.
    cut: String,
}

/// What happened to one kernel.
#[derive(Clone, Debug)]
pub struct Kept {
    kernel: String,
    boot: Duration,
    memory: u64,
    /// Bytes that the file takes on the disk.
    stored: u64,
    snapshot_ms: f64,
    /// How long nobody ran when it woke up beside the others.
    switch_ms: f64,
    /// From the start of a process to the guest's next line.
    restore: Duration,
    /// The same with the restore stub.
    by_stub: Duration,
    before: u64,
    after: u64,
}

/// Boots the guests one beside the other, keeps each in `dir`, wakes each up again, ends the process, and restores each in another.
///
/// # Errors
/// A step fails, or a guest that goes on is not the one that was kept.
pub fn keep(guests: &[Guest], dir: &Path) -> Result<Vec<Kept>> {
    let began = Instant::now();
    let mut vm = TestVm::start(&guests.first().context("no guest")?.run_args())?;
    let mut saved: Vec<Saved<'_>> = Vec::new();
    for (index, guest) in guests.iter().enumerate() {
        say(guest, "booting")?;
        let began = if index == 0 { began } else { Instant::now() };
        if let Some(last) = saved.last_mut() {
            let (console, _) = switch(&mut vm, guest, &guest.switch_args())?;
            last.console = console;
        }
        saved.push(save(&mut vm, guest, began, dir.join(format!("snapshot-{index}")))?);
    }
    let mut switches = Vec::new();
    for index in 0..saved.len() {
        let guest = saved[index].guest;
        let (console, ms) = switch(&mut vm, guest, &["--to".to_owned(), guest.word()])?;
        if index == 0 {
            saved.last_mut().context("a guest")?.console = console;
        }
        let (_, tick) = saved[index].goes_on(&mut vm)?;
        say(guest, &format!("tick {tick}, awake after {ms:.1} ms; {} kernels on one machine", guests.len()))?;
        switches.push(ms);
    }
    vm.ask("stop", &["--all"])?;
    let status = vm.wait()?;
    ensure!(status == 0, "the process of the saved kernels ended with status {status}, expected 0");
    saved.iter().zip(switches).map(|(saved, ms)| saved.restored(ms)).collect()
}

/// Has another guest run: what the one that ran has said since it did, and how long nobody ran.
fn switch(vm: &mut TestVm, to: &Guest, args: &[String]) -> Result<(Console, f64)> {
    let told = vm.ask("switch", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    vm.wait_for(&format!("sleeps, `{}` runs", to.word()))?;
    Ok((Console::of(vm.seen())?, told["pause_ms"].as_f64().context("no pause_ms")?))
}

/// Waits for the guest to live, and saves it; it stands still then.
fn save<'a>(vm: &mut TestVm, guest: &'a Guest, began: Instant, file: PathBuf) -> Result<Saved<'a>> {
    let ready = vm.wait_for("ready ")?;
    let boot = began.elapsed();
    say(guest, &format!("{ready}, after {:.1} s", boot.as_secs_f64()))?;
    for text in ["tick ", "boot_id ", "tick "] {
        vm.wait_for(text)?;
    }
    let summary = vm.snapshot(&file, "pause")?;
    let number = |name: &str| summary[name].as_f64().with_context(|| format!("the summary has no {name}"));
    let (memory, snapshot_ms) = (number("memory_bytes")? as u64, number("total_ms")?);
    Ok(Saved { guest, file, ready, boot, memory, snapshot_ms, console: Console::default() })
}

impl Saved<'_> {
    /// The next lines of a guest that goes on: when the first came, and its tick.
    fn goes_on(&self, vm: &mut TestVm) -> Result<(Instant, u64)> {
        let from = vm.seen().len();
        vm.next_line(Instant::now() + crate::vm::LIMIT)?;
        let came = Instant::now();
        vm.wait_for("boot_id ")?;
        vm.wait_for("tick ")?;
        let mut lines = vm.seen()[from..].to_vec();
        lines[0].insert_str(0, &self.console.cut);
        same_boot_id(&self.ready, &lines)?;
        let (before, after) = (self.before()?, ticks(&lines).next().context("the guest did not tick")?);
        ensure!(after == before + 1, "{}: tick {after} follows tick {before}", self.guest.name);
        Ok((came, after))
    }

    /// In two other processes, the second by way of the restore stub.
    fn restored(&self, switch_ms: f64) -> Result<Kept> {
        same_boot_id(&self.ready, &self.console.whole)?;
        let stored = std::fs::metadata(&self.file)?.blocks() * 512;
        let before = self.before()?;
        say(self.guest, &format!("tick {before}, saved in {} MiB, process ended", stored.div_ceil(MIB)))?;
        let (restore, after) = self.in_a_process(&[], "in a new process")?;
        let (by_stub, _) = self.in_a_process(&["--via-stub"], "in another, by way of the restore stub")?;
        let (kernel, boot) = (self.guest.name.clone(), self.boot);
        let (memory, snapshot_ms) = (self.memory, self.snapshot_ms);
        Ok(Kept { kernel, boot, memory, stored, snapshot_ms, switch_ms, restore, by_stub, before, after })
    }

    fn in_a_process(&self, arguments: &[&str], way: &str) -> Result<(Duration, u64)> {
        let began = Instant::now();
        let mut vm = TestVm::restore_with(&self.file, arguments)?;
        if !arguments.is_empty() {
            vm.wait_for("stub: ")?;
        }
        let (came, tick) = self.goes_on(&mut vm)?;
        let time = came - began;
        say(self.guest, &format!("tick {tick} {way}, first line after {} ms", time.as_millis()))?;
        Ok((time, tick))
    }

    fn before(&self) -> Result<u64> {
        ticks(&self.console.whole).next_back().context("the guest did not tick before its snapshot")
    }
}

impl Console {
    /// Of the guest that was cut off by the last of these lines: all that it has said since it runs.
    fn of(seen: &[String]) -> Result<Self> {
        let (_, before) = seen.split_last().context("the process said nothing")?;
        let began = before.iter().rposition(|line| line.starts_with("vmm: kernel ")).map_or(0, |at| at + 1);
        let (cut, whole) = before[began..].split_last().context("the guest said nothing")?;
        Ok(Self { whole: whole.to_vec(), cut: cut.clone() })
    }
}

/// Progress, where a person sees it at once.
fn say(guest: &Guest, what: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: {what}", guest.name).and_then(|()| out.flush()).context("cannot write")
}

fn ticks(lines: &[String]) -> impl DoubleEndedIterator<Item = u64> {
    lines.iter().filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
}

/// Every boot id on the console is the one of the `ready` line.
fn same_boot_id(ready: &str, console: &[String]) -> Result<()> {
    let id = ready.split("boot_id=").nth(1).and_then(|rest| rest.split(' ').next());
    let id = id.context("the ready line has no boot id")?;
    let other = console.iter().filter_map(|line| line.strip_prefix("boot_id ")).find(|other| *other != id);
    ensure!(other.is_none(), "the boot id was {id} and is {}", other.unwrap_or_default());
    Ok(())
}

/// A table of what was measured.
pub fn table(all: &[Kept]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "kernel",
        "boot s",
        "snapshot MiB",
        "of RAM MiB",
        "snapshot ms",
        "restore ms",
        "by stub ms",
        "boot/restore",
        "switch ms",
        "counter",
        "boot_id",
    ]);
    for kept in all {
        table.add_row(row(kept));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn row(kept: &Kept) -> [String; 11] {
    [
        kept.kernel.clone(),
        format!("{:.1}", kept.boot.as_secs_f64()),
        kept.stored.div_ceil(MIB).to_string(),
        (kept.memory / MIB).to_string(),
        format!("{:.0}", kept.snapshot_ms),
        kept.restore.as_millis().to_string(),
        kept.by_stub.as_millis().to_string(),
        format!("{:.0}", kept.boot.as_secs_f64() / kept.restore.as_secs_f64()),
        format!("{:.1}", kept.switch_ms),
        format!("{} -> {}", kept.before, kept.after),
        "same".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[&str]) -> Vec<String> {
        text.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn what_a_guest_said_is_told_from_what_others_did() {
        let seen = [
            "tick 9",
            "",
            "vmm: kernel `a` sleeps, `b` runs",
            "tick 11",
            "tick 1",
            "vmm: kernel `b` sleeps, `a` runs",
        ];
        let console = Console::of(&lines(&seen)).unwrap();
        assert_eq!((console.whole, console.cut.as_str()), (lines(&["tick 11"]), "tick 1"));
        assert!(Console::of(&lines(&["vmm: kernel `b` sleeps, `a` runs"])).is_err());
    }

    #[test]
    fn another_boot_id_is_found() {
        let ready = "ready kernel=6 boot_id=a-b cpus=1";
        assert!(same_boot_id(ready, &lines(&["boot_id a-b", "tick 1", "boot_id a-b"])).is_ok());
        let error = same_boot_id(ready, &lines(&["boot_id a-b", "boot_id c-d"])).unwrap_err();
        assert_eq!(error.to_string(), "the boot id was a-b and is c-d");
    }
}
