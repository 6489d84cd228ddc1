//! Disks and networks of a guest under `vmm`, beside the same guest under QEMU's `microvm`.
//!
//! In: the lab. Out: for each measure both medians and their ratio. Holds: the two run by turns on the same `/dev/kvm`, with
//! the same kernel, initrd, RAM, disk file and tap, so that what else the machine does slows both.
//!
//! ```text
//! outside ── lab ──► inside ── vmm, QEMU, vmm, QEMU … ──► guest: disk-speed, iperf3
//!    ▲                 └─ a line `sample {json}` for each measure of each round
//!    └── table, JSON
//! ```

pub mod inside;
pub mod outside;

use serde::{Deserialize, Serialize};

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Monitor {
    /// Ours.
    Vmm,
    /// QEMU's machine `microvm`.
    Qemu,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Under which monitor.
    pub monitor: Monitor,
    /// What was measured.
    pub measure: String,
    /// In the measure's unit; more is better.
    pub value: f64,
}

/// What comes before a sample in the lab's output.
const SAMPLE: &str = "sample ";

/// What is measured: its name and its unit.
pub const MEASURES: [(&str, &str); 8] = [
    ("seq-read", "MB/s"),
    ("seq-write", "MB/s"),
    ("rand-read-1", "IOPS"),
    ("rand-write-1", "IOPS"),
    ("rand-read-16", "IOPS"),
    ("rand-write-16", "IOPS"),
    ("net-send", "Mbit/s"),
    ("net-receive", "Mbit/s"),
];
