//! The bench's part on this machine: puts what is needed into the lab, and makes a table of what comes back.
//!
//! In: how many rounds, a file for JSON. Out: the table, the file. Holds: a measure that one of the monitors lacks is an error.

use super::{MEASURES, Monitor, SAMPLE, Sample};
use crate::figures::median;
use crate::lab::{Lab, microvm};
use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets};
use serde::Serialize;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

/// The longest that a round may take.
const ROUND: Duration = Duration::from_secs(300);

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub measure: String,
    /// In what.
    pub unit: String,
    /// Our median.
    pub vmm: f64,
    /// QEMU's.
    pub qemu: f64,
    /// Ours divided by QEMU's.
    pub ratio: f64,
}

/// Runs the bench in a lab, writes the rows to `json`, and returns the table.
///
/// # Errors
/// The lab fails, or a measure is missing.
pub fn run(rounds: u32, disk_speed: &Path, json: &Path) -> Result<Table> {
    let extra = tempfile::tempdir()?;
    prepare(extra.path(), disk_speed)?;
    let mut output = Collected::default();
    let lab = Lab::new().extra(extra.path()).limit(ROUND * rounds);
    let status = lab.stream(&format!("/extra/bench inside {rounds}"), &mut output)?;
    ensure!(status == 0, "the lab ended with status {status}");
    let rows = rows(&samples(&String::from_utf8_lossy(&output.0))?)?;
    fs::create_dir_all(json.parent().unwrap_or(Path::new(".")))?;
    fs::write(json, serde_json::to_vec_pretty(&rows)?).context("cannot write the JSON")?;
    Ok(table(&rows))
}

/// Puts QEMU, the guest's initrd and this program where the lab has them in `/extra`.
fn prepare(extra: &Path, disk_speed: &Path) -> Result<()> {
    microvm::install(&extra.join("qemu"))?;
    let kernel = guest_kernels::ensure("6.12")?;
    let initrd = guest_kernels::test_initrd(&kernel, &[disk_speed])?;
    fs::copy(initrd, extra.join("initrd"))?;
    fs::copy(std::env::current_exe()?, extra.join("bench"))?;
    Ok(())
}

fn samples(output: &str) -> Result<Vec<Sample>> {
    let lines = output.lines().filter_map(|line| line.strip_prefix(SAMPLE));
    lines.map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

fn rows(samples: &[Sample]) -> Result<Vec<Row>> {
    let row = |&(measure, unit): &(&str, &str)| {
        let of = |monitor| {
            let of =
                samples.iter().filter(|sample| (sample.monitor, &sample.measure[..]) == (monitor, measure));
            median(of.map(|sample| sample.value).collect())
                .with_context(|| format!("no {measure} of {monitor:?}"))
        };
        let (vmm, qemu) = (of(Monitor::Vmm)?, of(Monitor::Qemu)?);
        Ok(Row { measure: measure.to_owned(), unit: unit.to_owned(), vmm, qemu, ratio: vmm / qemu })
    };
    MEASURES.iter().map(row).collect()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["", "vmm", "QEMU microvm", "unit", "vmm ÷ QEMU"]);
    for Row { measure, unit, vmm, qemu, ratio } in rows {
        table.add_row([
            measure.clone(),
            format!("{vmm:.0}"),
            format!("{qemu:.0}"),
            unit.clone(),
            format!("{ratio:.2}"),
        ]);
    }
    table
}

/// The lab's output, kept and passed on to standard error as it comes.
#[derive(Default)]
struct Collected(Vec<u8>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(bytes)?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_that_of_the_medians() {
        let mut output = String::new();
        for (measure, _) in MEASURES {
            for (monitor, values) in [("vmm", [1, 9, 2]), ("qemu", [4, 3, 8])] {
                for value in values {
                    let sample =
                        format!(r#"{{"monitor":"{monitor}","measure":"{measure}","value":{value}}}"#);
                    output += &format!("noise\n{SAMPLE}{sample}\n");
                }
            }
        }
        let rows = rows(&samples(&output).unwrap()).unwrap();
        assert_eq!(rows.len(), MEASURES.len());
        assert!(rows.iter().all(|row| (row.vmm, row.qemu, row.ratio) == (2.0, 4.0, 0.5)));
    }

    #[test]
    fn a_measure_that_is_missing_is_named() {
        let error = rows(&[]).unwrap_err().to_string();
        assert_eq!(error, "no seq-read of Vmm");
    }
}
