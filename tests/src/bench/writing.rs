//! What a snapshot costs to write, beside what the same bytes cost by themselves.
//!
//! In: a directory on a disk. Out: rows: a whole snapshot beside `dd`, an incremental one beside a whole one. Holds: all of them write to the
//! same file system, take turns, and are on the disk when they are done.

use super::live::written;
use super::report::Row;
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Of whole snapshots, and of incremental ones.
const ROUNDS: [usize; 2] = [5, 3];
/// Disks that are shared by many let each be fast for a moment only.
const REST: Duration = Duration::from_secs(3);
const MEMORY: &str = "512M";
/// What the guests fill of it, in MiB.
const FILLED: u64 = 490;
/// One page in so many changes before an incremental snapshot.
const ONE_IN: u64 = 20;
const MIB: f64 = 1024.0 * 1024.0;

/// A whole snapshot, in MiB per second, beside `dd conv=fsync` of the same bytes.
///
/// # Errors
/// The guest can't be saved, or `dd` fails.
pub fn whole(dir: &Path) -> Result<Vec<Row>> {
    let guest = Guest::bare("scatter", dir)?.memory(MEMORY).cmdline(&format!("size={FILLED} every=64"));
    let [first, file, copy] = ["first", "whole", "whole.dd"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot(&first, "resume")?;
    let (mut snapshots, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS[0] {
        snapshots.push(saved(&vm, &file)?);
        copies.push(dd(&first, &copy)?);
    }
    gone(&[&first])?;
    let what = format!("{MEMORY}: snapshot, beside dd conv=fsync of the same bytes");
    Ok(vec![Row::new(&what, "MiB/s", snapshots).beside(&copies).at_least(0.8)])
}

/// MiB per second at which a snapshot is written.
fn saved(vm: &TestVm, file: &Path) -> Result<f64> {
    rest();
    let [bytes, ms] = numbers(&vm.snapshot(file, "resume")?, ["stored_bytes", "total_ms"])?;
    gone(&[file])?;
    Ok(bytes / MIB / ms * 1e3)
}

/// The same of `dd`, which copies what is in the page cache.
fn dd(from: &Path, to: &Path) -> Result<f64> {
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", from.display())).arg(format!("of={}", to.display()));
    rest();
    let began = Instant::now();
    let done = dd.args(["bs=1M", "conv=fsync", "status=none"]).status().context("cannot run dd")?;
    ensure!(done.success(), "dd: {done}");
    let seconds = began.elapsed().as_secs_f64();
    let bytes = fs::metadata(to)?.len() as f64;
    gone(&[to])?;
    Ok(bytes / MIB / seconds)
}

/// Incremental snapshots of a guest that has changed 5 % of its RAM, beside whole ones of the same instant: pages here and there, and pages in one
/// place.
///
/// # Errors
/// The guest can't be saved or restored.
pub fn incremental(dir: &Path) -> Result<Vec<Row>> {
    let mut rows = changed(dir, "5 % changed, page by page", "")?;
    rows.extend(changed(dir, "5 % changed, in one place", "stride=1")?);
    Ok(rows)
}

/// Of one guest.
fn changed(dir: &Path, name: &str, order: &str) -> Result<Vec<Row>> {
    let guest = Guest::bare("dirty", dir)?.memory(MEMORY);
    let guest = guest.cmdline(&format!("size={FILLED} rate=12800 lines=100 verify=0 {order}"));
    let [base, part, whole, bare] = ["base", "part", "all", "bare"].map(|name| dir.join(name));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&base)?;
    let (mut parts, mut wholes, mut bares, mut bytes, mut all) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    for _ in 0..ROUNDS[1] {
        let vm = has_changed(&guest, &base)?;
        let path = |path: &Path| path.display().to_string();
        rest();
        let summary = vm.ask("snapshot", &["--parent", &path(&base), &path(&part)])?;
        parts.extend(numbers(&summary, ["total_ms"])?);
        rest();
        wholes.extend(numbers(&vm.snapshot(&whole, "pause")?, ["total_ms"])?);
        rest();
        bares.push(rewritten(&part, &bare)?);
        bytes.push(allocated(&part)?);
        all.push(allocated(&whole)?);
        gone(&[&part, &whole, &bare])?;
    }
    let row = |what: &str, unit, samples| Row::new(&format!("{MEMORY}, {name}: {what}"), unit, samples);
    Ok(vec![
        row("incremental, beside a whole snapshot", "ms", parts.clone()).beside(&wholes).goal(0.1),
        row("its bytes, beside the whole's", "MiB", bytes).beside(&all).goal(0.1),
        row("only to write and sync its bytes, beside the whole", "ms", bares.clone()).beside(&wholes),
    ])
}

/// The guest, restored, paused after it has changed its part.
fn has_changed(guest: &Guest, base: &Path) -> Result<TestVm> {
    let mut vm = TestVm::restore(base)?;
    let first = written(&vm.wait_for(guest.pulse)?)?;
    let deadline = Instant::now() + LIMIT;
    while written(&vm.next_line(deadline)?)? < first + FILLED * 256 / ONE_IN {}
    vm.ask("pause", &[])?;
    Ok(vm)
}

/// Milliseconds to write a file's data, without its holes, to another, and to sync that.
fn rewritten(from: &Path, to: &Path) -> Result<f64> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let read = |range: Range<u64>| -> Result<_> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        from.read_exact_at(&mut bytes, range.start)?;
        Ok((range.start, bytes))
    };
    let data = data(&from)?.into_iter().map(read).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    to.set_len(from.metadata()?.len())?;
    data.iter().try_for_each(|(at, bytes)| to.write_all_at(bytes, *at))?;
    to.sync_all()?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// Where a file has data (`lseek(2)`).
fn data(file: &File) -> Result<Vec<Range<u64>>> {
    // SAFETY: the file is open; the call moves only its offset.
    let seek =
        |from: u64, whence| u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) });
    let (mut found, mut at) = (Vec::new(), 0);
    while let Ok(start) = seek(at, libc::SEEK_DATA) {
        at = seek(start, libc::SEEK_HOLE)?;
        found.push(start..at);
    }
    Ok(found)
}

fn allocated(file: &Path) -> Result<f64> {
    Ok(fs::metadata(file)?.blocks() as f64 * 512.0 / MIB)
}

fn gone(files: &[&Path]) -> Result<()> {
    Ok(files.iter().try_for_each(fs::remove_file)?)
}

/// Waits until the disk has nothing more to do, and for a while more.
fn rest() {
    // SAFETY: a call without arguments.
    unsafe { libc::sync() };
    std::thread::sleep(REST);
}

fn numbers<const N: usize>(summary: &serde_json::Value, names: [&str; N]) -> Result<[f64; N]> {
    let found = names.map(|name| summary[name].as_f64());
    ensure!(found.iter().all(Option::is_some), "{names:?} in {summary}");
    Ok(found.map(Option::unwrap_or_default))
}
