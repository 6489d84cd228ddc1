//! What a restore costs, beside what KVM costs.
//!
//! In: `/dev/kvm`, guests. Out: rows of one table. Holds: a figure and its floor are measured by turns in one run, so that what else
//! the machine does slows both; a row gives medians.

mod chart;
mod clones;
mod cold;
mod lab;
mod live;
mod qemu;
mod report;
mod restores;
mod switches;
mod writing;

pub use clones::clones;
pub use cold::cold;
pub use lab::{in_the_lab, inside, qemu_inside};
pub use live::live;
pub use report::{Goal, Report, Row};
pub use restores::{Subject, restores};
pub use switches::{Cost, two_sizes};
pub use writing::{incremental, whole};
