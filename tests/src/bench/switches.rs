//! Switches from kernel to kernel beside their floor.
//!
//! In: milliseconds of both, measured by turns. Out: rows. Holds: sizes are compared pair by pair, since what else a machine does comes
//! and goes.

use super::Row;
use crate::figures::median;
use anyhow::{Context, Result};

/// What the way from one kernel to another took, and the floor between, in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    /// Each time.
    pub times: Vec<f64>,
    /// Each run of the floor.
    pub floors: Vec<f64>,
}

impl Cost {
    /// Beside the floor, of which it should be no more than twice.
    pub fn row(&self, what: &str) -> Row {
        Row::new(what, "ms", self.times.clone()).beside(&self.floors).goal(2.0)
    }
}

/// Rows of switches with 512 MiB and with 4 GiB, of how the two compare, and of how their floors do.
///
/// # Errors
/// There are none.
pub fn two_sizes([small, large]: &[Cost; 2]) -> Result<Vec<Row>> {
    let ratios = |of: &dyn Fn(&Cost, usize) -> f64| {
        median(
            (0..small.times.len().min(large.times.len()))
                .map(|turn| of(large, turn) / of(small, turn))
                .collect(),
        )
        .context("no switch")
    };
    let plain = ratios(&|cost, turn| cost.times[turn])?;
    let floors = ratios(&|cost, turn| cost.floors[turn])?;
    Ok(vec![
        small.row("512M: switch to a resident kernel"),
        large.row("4G: switch to a resident kernel"),
        Row::new("4G \u{f7} 512M, turn by turn", "", vec![plain]).goal(1.1),
        // What KVM makes of the two sizes.
        Row::new("the same of the floors", "", vec![floors]),
    ])
}
