//! The bench's table, and the same as JSON.
//!
//! In: rows. Out: text, files in `target/bench/`. Holds: a ratio is the median of those of each turn, since what else the
//! machine does slows both of a turn; a goal is met or not, never left open.

use super::chart;
use crate::figures::median;
use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::Path;

/// What a row's ratio is held to, or without a floor its figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// It may be this and no more.
    AtMost(f64),
    /// It should be this or more.
    AtLeast(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    /// The number.
    pub(super) fn value(self) -> f64 {
        let (Self::AtMost(value) | Self::AtLeast(value)) = self;
        value
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if matches!(self, Self::AtMost(_)) { '≤' } else { '≥' };
        write!(f, "{sign} {}", self.value())
    }
}

/// One line of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// In what.
    pub unit: String,
    /// The median.
    pub figure: f64,
    /// The median of what it is held against.
    pub floor: Option<f64>,
    /// What is wanted of the ratio, or without a floor of the figure.
    pub goal: Option<Goal>,
    /// Each measurement.
    pub samples: Vec<f64>,
    /// Each of what it is held against.
    pub floors: Vec<f64>,
}

impl Row {
    /// The median of these samples.
    pub fn new(what: &str, unit: &str, samples: Vec<f64>) -> Self {
        Self {
            what: what.to_owned(),
            unit: unit.to_owned(),
            figure: median(samples.clone()).unwrap_or(f64::NAN),
            samples,
            ..Self::default()
        }
    }

    /// Held against these.
    pub fn beside(mut self, floor: &[f64]) -> Self {
        (self.floor, self.floors) = (median(floor.to_vec()), floor.to_vec());
        self
    }

    /// With the most that it may be.
    pub fn goal(mut self, most: f64) -> Self {
        self.goal = Some(Goal::AtMost(most));
        self
    }

    /// With the least that it should be.
    pub fn at_least(mut self, least: f64) -> Self {
        self.goal = Some(Goal::AtLeast(least));
        self
    }

    /// The figure as a multiple of the floor, turn by turn if there is one for each.
    pub fn ratio(&self) -> Option<f64> {
        if self.samples.len() != self.floors.len() {
            return self.floor.map(|floor| self.figure / floor);
        }
        median(self.samples.iter().zip(&self.floors).map(|(figure, floor)| figure / floor).collect())
    }

    /// Whether the goal is met, if there is one.
    pub fn met(&self) -> Option<bool> {
        self.goal.map(|goal| goal.is_met(self.ratio().unwrap_or(self.figure)))
    }
}

/// All rows of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where it ran.
    pub place: String,
    /// Its rows.
    pub rows: Vec<Row>,
}

impl Report {
    /// The rows of all of these that have a goal, each with its place.
    pub fn goals(name: &str, reports: &[Self]) -> Self {
        let placed = |place: &str, row: &Row| Row { what: format!("{place}: {}", row.what), ..row.clone() };
        let rows = reports.iter().flat_map(|report| report.rows.iter().map(|row| placed(&report.place, row)));
        Self { place: name.to_owned(), rows: rows.filter(|row| row.goal.is_some()).collect() }
    }

    /// The table.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header([&self.place, "figure", "unit", "floor", "ratio", "goal", ""]);
        for row in &self.rows {
            let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
            let goal = row.goal.map_or(String::new(), |goal| goal.to_string());
            let met = row.met().map_or("", |met| if met { "met" } else { "MISSED" });
            let floor = number(row.floor);
            let figure = number(Some(row.figure));
            table.add_row([&row.what, &figure, &row.unit, &floor, &number(row.ratio()), &goal, met]);
        }
        table
    }

    /// Writes `NAME.json` and `NAME.svg` to a directory, which is made.
    ///
    /// # Errors
    /// It can't be written to.
    pub fn write(&self, dir: &Path, name: &str) -> Result<()> {
        fs::create_dir_all(dir)?;
        let json = dir.join(format!("{name}.json"));
        fs::write(&json, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", json.display()))?;
        fs::write(dir.join(format!("{name}.svg")), chart::svg(self)).context("cannot write the chart")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_for_the_ratio_if_there_is_one() {
        let row = Row::new("restore", "ms", vec![3.0, 1.0, 2.0]).goal(1.3);
        assert_eq!((row.figure, row.met()), (2.0, Some(false)));
        let row = row.beside(&[1.5, 0.8, 9.0]);
        assert_eq!((row.ratio(), row.met()), (Some(1.25), Some(true)));
        let row = row.goal(1.2);
        assert_eq!((row.met(), row.at_least(1.2).met()), (Some(false), Some(true)));
    }

    #[test]
    fn goals_of_all_places_are_in_one_table() {
        let report = |place: &str| {
            let rows = vec![Row::new("a", "ms", vec![1.0]).goal(1.0), Row::new("b", "ms", vec![1.0])];
            Report { place: place.to_owned(), rows }
        };
        let all = Report::goals("all", &[report("here"), report("there")]);
        let names: Vec<_> = all.rows.iter().map(|row| row.what.as_str()).collect();
        assert_eq!((all.place.as_str(), &names[..]), ("all", &["here: a", "there: a"][..]));
    }

    #[test]
    fn the_table_has_a_line_for_each_row() {
        let rows = vec![Row::new("a thing", "ms", vec![2.0]).beside(&[1.0]).goal(1.5)];
        let table = Report { place: "here".to_owned(), rows }.table().to_string();
        let line = table.lines().find(|line| line.contains("a thing")).unwrap();
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        assert_eq!(cells[1..8], ["a thing", "2.00", "ms", "1.00", "2.00", "≤ 1.5", "MISSED"]);
    }
}
