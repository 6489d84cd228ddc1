//! For how long a live snapshot stops a guest that writes all the time, and what that guest gets done meanwhile.
//!
//! In: a directory on a disk. Out: rows: of a VM that was booted and of one that was restored. Holds: the guest writes 100 MiB/s, scattered over
//! 1 GiB, all of which is in use; a restored one has had all of it before its first snapshot.

use super::report::Row;
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
/// In MiB, of pages that are written, and 100 MiB/s of them.
const SIZE: u64 = 1024;
const CMDLINE: &str = "size=1024 rate=25600 lines=100 verify=0";
const MEMORY: &str = "1056M";
const PAGES_PER_MIB: u64 = 256;
/// After a live snapshot the monitor takes a moment to put huge pages together.
const BETWEEN: Duration = Duration::from_secs(2);

/// Live snapshots, one after the other, of one guest booted and of another restored.
///
/// # Errors
/// A snapshot fails, or a guest says nothing.
pub fn live(dir: &Path) -> Result<Vec<Row>> {
    let (file, whole) = (dir.join("live"), dir.join("live.base"));
    let guest = Guest::bare("dirty", dir)?.memory(MEMORY).cmdline(CMDLINE);
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    let booted = Seen::of(&mut vm, &file)?;
    vm.snapshot_and_stop(&whole)?;
    let mut vm = TestVm::restore(&whole)?;
    let first = written(&vm.wait_for(guest.pulse)?)?;
    let deadline = Instant::now() + LIMIT;
    while written(&vm.next_line(deadline)?)? < first + SIZE * PAGES_PER_MIB {}
    let restored = Seen::of(&mut vm, &file)?;
    drop(vm);
    fs::remove_file(&whole)?;
    Ok([booted.rows("a booted guest"), restored.rows("a restored guest")].concat())
}

/// What was seen of some live snapshots.
#[derive(Default)]
struct Seen {
    /// Milliseconds that the guest stood still.
    pauses: Vec<f64>,
    /// MiB per second that it wrote before, and while the snapshot was written.
    before: Vec<f64>,
    meanwhile: Vec<f64>,
}

impl Seen {
    fn of(vm: &mut TestVm, file: &Path) -> Result<Self> {
        let mut seen = Self::default();
        for _ in 0..ROUNDS {
            let early = Mark::now(vm)?;
            std::thread::sleep(BETWEEN);
            let start = Mark::now(vm)?;
            let summary = vm.ask("snapshot", &[file.to_str().context("path")?, "--live"])?;
            let end = Mark::now(vm)?;
            seen.pauses.push(summary["pause_ms"].as_f64().with_context(|| format!("no pause: {summary}"))?);
            seen.before.push(early.until(&start));
            seen.meanwhile.push(start.until(&end));
            fs::remove_file(file)?;
        }
        Ok(seen)
    }

    fn rows(self, name: &str) -> Vec<Row> {
        let what = |what: &str| format!("live snapshot of 1 GiB, {name} that writes 100 MiB/s: {what}");
        vec![
            Row::new(&what("stands still"), "ms", self.pauses).goal(10.0),
            Row::new(&what("writes meanwhile, beside before"), "MiB/s", self.meanwhile).beside(&self.before),
        ]
    }
}

/// How much the guest had written when.
struct Mark {
    at: Instant,
    pages: u64,
}

impl Mark {
    /// By its last line, and it says a hundred a second.
    fn now(vm: &mut TestVm) -> Result<Self> {
        let deadline = Instant::now() + LIMIT;
        vm.lines_within(Duration::from_millis(1));
        let line = vm.next_line(deadline)?;
        Ok(Self { at: Instant::now(), pages: written(&line)? })
    }

    /// MiB per second.
    fn until(&self, later: &Self) -> f64 {
        (later.pages - self.pages) as f64 / PAGES_PER_MIB as f64 / (later.at - self.at).as_secs_f64()
    }
}

/// The number of pages in a line of the guest's.
pub(super) fn written(line: &str) -> Result<u64> {
    let number = line.split("written=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    number.with_context(|| format!("the guest says: {line}"))
}
