//! The bench in the lab, with a stock Linux guest, and beside QEMU.
//!
//! In: which part, how many rounds. Out: rows. Holds: the same program runs on both sides; inside it prints its report on one line.

use super::qemu::beside_qemu;
use super::{Report, Row, Subject, restores};
use crate::guests::Guest;
use crate::lab::{Lab, microvm};
use crate::lost;
use crate::stories;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What comes before the report in the lab's output.
const REPORT: &str = "report ";
const LIMIT: Duration = Duration::from_secs(900);

/// Runs a part of this program in a lab: what [`inside`] or [`qemu_inside`] does. If the lab loses a guest it is started once more, aloud.
///
/// # Errors
/// The lab fails, or says nothing.
pub fn in_the_lab(part: &str) -> Result<Report> {
    let (mut status, mut output) = told(part)?;
    if status != 0 && lost::by_the_lab(&output) {
        eprintln!("bench: the lab lost a guest, and is started once more; it had said:\n{output}");
        (status, output) = told(part)?;
    }
    ensure!(status == 0, "the lab ended with status {status}:\n{output}");
    let report = output.lines().find_map(|line| line.strip_prefix(REPORT));
    Ok(serde_json::from_str(report.with_context(|| format!("no report:\n{output}"))?)?)
}

/// The lab's status, and what it said.
fn told(part: &str) -> Result<(u8, String)> {
    let extra = tempfile::tempdir()?;
    fs::copy(std::env::current_exe()?, extra.path().join("bench"))?;
    microvm::install(&extra.path().join("qemu"))?;
    let mut output = Vec::new();
    let lab = Lab::new().extra(extra.path()).limit(LIMIT);
    let status = lab.stream(&format!("/extra/bench inside {part}"), &mut output)?;
    Ok((status, String::from_utf8_lossy(&output).into_owned()))
}

/// A live snapshot of a guest under load, beside one for all of which it stands still.
fn live(dir: &Path) -> Result<Vec<Row>> {
    let guest = Guest::linux("6.12", "witness").cpus(2).proof("witness round=").memory("1G");
    let stories::Pauses { booted, restored, whole } = stories::live(&guest, dir)?;
    let row = |which: &str, pause| {
        let what = format!("live snapshot of 1 GiB, {which} Linux 6.12: stands still, beside stop-and-copy");
        Row::new(&what, "ms", vec![pause]).beside(&[whole]).goal(0.05)
    };
    Ok(vec![row("a booted", booted), row("a restored", restored)])
}

/// The part in the lab.
///
/// # Errors
/// A guest can't be kept or restored.
pub fn inside(rounds: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for (name, memory) in [("Linux 6.12, 256M", "256M"), ("Linux 6.12, 1G", "1G")] {
        let file = dir.path().join(memory);
        let guest = Guest::linux("6.12", "").memory(memory);
        let mut vm = TestVm::start(&guest.run_args())?;
        vm.wait_for(guest.pulse)?;
        vm.snapshot_and_stop(&file)?;
        rows.extend(restores(&Subject { name: name.to_owned(), file, exits_at_once: false }, rounds)?);
    }
    rows.extend(live(dir.path())?);
    tell("the lab (times of an emulated processor)", rows)
}

/// The other part in the lab.
///
/// # Errors
/// A guest can't be saved or restored.
pub fn qemu_inside() -> Result<()> {
    let dir = tempfile::tempdir()?;
    tell("the lab, beside QEMU", beside_qemu(dir.path())?)
}

fn tell(place: &str, rows: Vec<Row>) -> Result<()> {
    let report = Report { place: place.to_owned(), rows };
    println!("{REPORT}{}", serde_json::to_string(&report)?);
    Ok(())
}
