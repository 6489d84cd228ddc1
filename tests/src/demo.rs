//! The demonstration: a stock kernel is booted, kept in a file, and goes on in another process.
//!
//! In: a guest whose console has ticks and its boot id. Out: what was measured, told line by line as it happens. Holds: it
//! fails unless the counter goes on with the next number and the boot id is the same.

use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What a guest runs beside its ticks. It starts no process but `sleep`, so that it costs little.
pub const SAYS_BOOT_ID: &str =
    "while read -r id </proc/sys/kernel/random/boot_id; do echo boot_id $id; sleep 0.1; done";
/// The last line of a process whose VM was ended on request. It follows the guest's last byte, not its last line.
const LAST_WORDS: &str = "vmm: stopped";
const MIB: u64 = 1 << 20;

/// What happened to one kernel.
#[derive(Clone, Debug)]
pub struct Kept {
    kernel: String,
    /// From the start of the process to the guest's `ready`.
    boot: Duration,
    /// Bytes of guest RAM.
    memory: u64,
    /// Bytes that the file takes on the disk.
    stored: u64,
    /// Milliseconds from the request to the file on disk.
    snapshot_ms: f64,
    /// From the start of the process to the guest's next line.
    restore: Duration,
    /// The same with the restore stub.
    by_stub: Duration,
    before: u64,
    after: u64,
}

/// Boots the guest, keeps it in `dir`, ends its process and restores it in another.
///
/// # Errors
/// A step fails, or the guest that goes on is not the one that was kept.
pub fn keep(guest: &Guest, dir: &Path) -> Result<Kept> {
    let file = dir.join("snapshot");
    say(guest, "booting")?;
    let began = Instant::now();
    let mut vm = TestVm::start(&guest.run_args())?;
    let ready = vm.wait_for("ready ")?;
    let boot = began.elapsed();
    say(guest, &format!("{ready}, after {:.1} s", boot.as_secs_f64()))?;
    for text in ["tick ", "boot_id ", "tick "] {
        vm.wait_for(text)?;
    }
    let summary = vm.snapshot(&file, "stop")?;
    let status = vm.wait()?;
    ensure!(status == 0, "the process of the saved VM ended with status {status}, expected 0");
    let (mut console, cut) = console(vm.seen())?;
    let before = last_tick(&console).context("the guest did not tick before its snapshot")?;
    let stored = std::fs::metadata(&file)?.blocks() * 512;
    say(guest, &format!("tick {before}, saved in {} MiB, process ended", stored.div_ceil(MIB)))?;

    let mut after = 0;
    let [restore, by_stub] = [&[][..], &["--via-stub"]].map(|arguments| {
        let (time, went_on) = go_on(&file, arguments, &cut)?;
        after = ticks(&went_on).next().context("the guest did not tick after its restore")?;
        let way =
            if arguments.is_empty() { "in a new process" } else { "in another, by way of the restore stub" };
        say(guest, &format!("tick {after} {way}, first line after {} ms", time.as_millis()))?;
        ensure!(after == before + 1, "tick {after} follows tick {before}");
        console.extend(went_on);
        Ok(time)
    });
    let (restore, by_stub) = (restore?, by_stub?);
    same_boot_id(&ready, &console)?;
    let number = |name: &str| summary[name].as_f64().with_context(|| format!("the summary has no {name}"));
    let (memory, snapshot_ms) = (number("memory_bytes")? as u64, number("total_ms")?);
    Ok(Kept {
        kernel: guest.name.clone(),
        boot,
        memory,
        stored,
        snapshot_ms,
        restore,
        by_stub,
        before,
        after,
    })
}

/// Restores the snapshot: the time to the guest's first line, and its lines, the first put together with what was cut off.
fn go_on(file: &Path, arguments: &[&str], cut: &str) -> Result<(Duration, Vec<String>)> {
    let began = Instant::now();
    let mut vm = TestVm::restore_with(file, arguments)?;
    if !arguments.is_empty() {
        vm.wait_for("stub: ")?;
    }
    let first = vm.next_line(began + crate::vm::LIMIT)?;
    let time = began.elapsed();
    vm.wait_for("boot_id ")?;
    vm.wait_for("tick ")?;
    let lines = vm.seen().iter().skip_while(|line| **line != first).skip(1).cloned();
    Ok((time, std::iter::once(format!("{cut}{first}")).chain(lines).collect()))
}

/// Progress, where a person sees it at once.
fn say(guest: &Guest, what: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: {what}", guest.name).and_then(|()| out.flush()).context("cannot write")
}

/// The console's whole lines, and the beginning of the line that the snapshot cut in two, often empty.
fn console(seen: &[String]) -> Result<(Vec<String>, String)> {
    let (last, whole) = seen.split_last().context("the process said nothing")?;
    let cut = last.strip_suffix(LAST_WORDS);
    let cut = cut.with_context(|| format!("the process ended with \"{last}\", expected \"{LAST_WORDS}\""))?;
    Ok((whole.to_vec(), cut.to_owned()))
}

fn ticks(lines: &[String]) -> impl DoubleEndedIterator<Item = u64> {
    lines.iter().filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
}

fn last_tick(lines: &[String]) -> Option<u64> {
    ticks(lines).next_back()
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

fn row(kept: &Kept) -> [String; 10] {
    [
        kept.kernel.clone(),
        format!("{:.1}", kept.boot.as_secs_f64()),
        kept.stored.div_ceil(MIB).to_string(),
        (kept.memory / MIB).to_string(),
        format!("{:.0}", kept.snapshot_ms),
        kept.restore.as_millis().to_string(),
        kept.by_stub.as_millis().to_string(),
        format!("{:.0}", kept.boot.as_secs_f64() / kept.restore.as_secs_f64()),
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
    fn a_line_cut_by_the_snapshot_is_put_together_again() {
        let (whole, cut) = console(&lines(&["tick 11", "tick 1vmm: stopped"])).unwrap();
        assert_eq!((last_tick(&whole), cut.as_str()), (Some(11), "tick 1"));
        assert_eq!(ticks(&[cut + "2"]).next(), Some(12));
    }

    #[test]
    fn a_process_that_did_not_say_that_it_stopped_is_an_error() {
        assert!(console(&lines(&["tick 11"])).is_err());
        assert!(console(&[]).is_err());
    }

    #[test]
    fn another_boot_id_is_found() {
        let ready = "ready kernel=6 boot_id=a-b cpus=1";
        assert!(same_boot_id(ready, &lines(&["boot_id a-b", "tick 1", "boot_id a-b"])).is_ok());
        let error = same_boot_id(ready, &lines(&["boot_id a-b", "boot_id c-d"])).unwrap_err();
        assert_eq!(error.to_string(), "the boot id was a-b and is c-d");
    }
}
