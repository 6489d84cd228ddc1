//! What an upgrade took.
//!
//! In: the times of its phases. Out: a table, or JSON. Holds: the downtime is from when the processes are asked to stop until they run and
//! are heard again, all of it as seen from outside.

use crate::kernel;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// An upgrade that has happened.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The kernel that was.
    pub from: String,
    /// The kernel that is.
    pub to: String,
    /// Each phase, in order.
    pub phases: Vec<Phase>,
    /// From the beginning of the dump until the processes are heard again, in milliseconds.
    pub downtime_ms: f64,
    /// Bytes that were written to disks on trial.
    pub written_bytes: u64,
}

/// One phase.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// What is done.
    pub name: &'static str,
    /// In milliseconds.
    pub ms: f64,
    /// Whether the processes stood still.
    pub waited_for: bool,
    /// What the guest told of it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub told: String,
}

impl Phase {
    /// During which the processes ran.
    pub(super) fn aside(name: &'static str, time: Duration) -> Self {
        Self { name, ms: time.as_secs_f64() * 1e3, waited_for: false, told: String::new() }
    }

    /// During which they did not.
    pub(super) fn down(name: &'static str, time: Duration) -> Self {
        Self { waited_for: true, ..Self::aside(name, time) }
    }

    pub(super) fn told(self, told: String) -> Self {
        Self { told, ..self }
    }
}

/// A version without who compiled it.
pub(super) fn release(version: Option<&str>) -> String {
    version.map_or("unknown", kernel::release).to_owned()
}

/// A line for each phase, and one for all.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} -> {}", self.from, self.to)?;
        for Phase { name, ms, waited_for, told } in &self.phases {
            let beside = if *waited_for { "" } else { "  while the processes ran" };
            let told = if told.is_empty() { String::new() } else { format!("  {told}") };
            writeln!(f, "{name:<10} {ms:>9.1} ms{beside}{told}")?;
        }
        write!(f, "{:<10} {:>9.1} ms", "downtime", self.downtime_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_phase() {
        let ms = Duration::from_millis;
        let phases = vec![
            Phase::aside("boot", ms(9000)),
            Phase::down("dump", ms(120)).told("bytes=12".into()),
            Phase::down("switch", ms(8)),
        ];
        let (from, to) = ("6.1".to_owned(), "6.12".to_owned());
        let report = Report { from, to, phases, downtime_ms: 130.0, written_bytes: 0 };
        let expected = "6.1 -> 6.12\nboot          9000.0 ms  while the processes ran\ndump           120.0 ms  bytes=12\nswitch           8.0 ms\ndowntime       130.0 ms";
        assert_eq!(report.to_string(), expected);
    }
}
