//! The bench in the lab, with a stock Linux guest.
//!
//! In: how many rounds. Out: rows. Holds: the same program runs on both sides; inside it prints its report on one line.

use super::{Report, Subject, restores};
use crate::guests::Guest;
use crate::lab::Lab;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::time::Duration;

/// What comes before the report in the lab's output.
const REPORT: &str = "report ";
const LIMIT: Duration = Duration::from_secs(580);

/// Runs this program in a lab.
///
/// # Errors
/// The lab fails, or says nothing.
pub fn in_the_lab(rounds: usize) -> Result<Report> {
    let extra = tempfile::tempdir()?;
    fs::copy(std::env::current_exe()?, extra.path().join("bench"))?;
    let mut output = Vec::new();
    let lab = Lab::new().extra(extra.path()).limit(LIMIT);
    let status = lab.stream(&format!("/extra/bench inside {rounds}"), &mut output)?;
    let output = String::from_utf8_lossy(&output);
    ensure!(status == 0, "the lab ended with status {status}:\n{output}");
    let report = output.lines().find_map(|line| line.strip_prefix(REPORT));
    Ok(serde_json::from_str(report.with_context(|| format!("no report:\n{output}"))?)?)
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
    let place = "the lab (times of an emulated processor)".to_owned();
    println!("{REPORT}{}", serde_json::to_string(&Report { place, rows })?);
    Ok(())
}
