//! A machine, seen from outside.
//!
//! In: what the machine is and does. Out: JSON, or lines for a person. Holds: what a guest or a file said prints without control characters.

use super::{mebibytes, printable};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// A machine, seen from outside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What its owner calls it.
    pub name: String,
    /// Whether the vCPUs run.
    pub state: RunState,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// What the guest's kernel said it is; none if it said nothing.
    pub kernel: Option<String>,
    /// The kernel or snapshot file that this process started the machine from.
    pub started_from: PathBuf,
    /// The balloon; none if there is no such device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStatus>,
    /// Seconds since this process started the machine.
    pub uptime_seconds: f64,
    /// The VMM's process.
    pub pid: u32,
    /// The VMM's version.
    pub version: String,
    /// The socket file of the guest's vsock device, absolute; none if it has no such device.
    #[serde(default)]
    pub vsock: Option<PathBuf>,
    /// The network devices.
    #[serde(default)]
    pub networks: Vec<NetworkStatus>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// What its owner calls it.
    pub id: String,
    /// The interface's name, or `fd:` and the number of the descriptor that it came as.
    pub tap: String,
    /// The guest's address, as six pairs of hexadecimal digits.
    pub mac: String,
}

/// A few lines for a person, without control characters, which would speak to the reader's terminal.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let started_from = self.started_from.display().to_string();
        writeln!(f, "name     {}", printable(&self.name))?;
        writeln!(f, "state    {}", self.state)?;
        writeln!(f, "vcpus    {}", self.vcpus)?;
        writeln!(f, "memory   {}", mebibytes(self.memory_bytes))?;
        writeln!(f, "kernel   {}", printable(self.kernel.as_deref().unwrap_or("unknown")))?;
        writeln!(f, "from     {}", printable(&started_from))?;
        if let Some(balloon) = self.balloon {
            let (actual, target) = (mebibytes(balloon.actual_bytes), mebibytes(balloon.target_bytes));
            writeln!(f, "balloon  {actual} of {target}")?;
        }
        writeln!(f, "uptime   {:.1} s", self.uptime_seconds)?;
        if let Some(path) = &self.vsock {
            writeln!(f, "vsock    {}", printable(&path.display().to_string()))?;
        }
        for NetworkStatus { id, tap, mac } in &self.networks {
            writeln!(f, "network  {} on {}, {}", printable(id), printable(tap), printable(mac))?;
        }
        write!(f, "process  {}, version {}", self.pid, printable(&self.version))
    }
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// They run.
    Running,
    /// They are stopped until [`Command::Resume`](super::Command::Resume).
    Paused,
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
        })
    }
}

/// How much memory the guest was asked for, and how much it says it has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// In bytes, asked for.
    pub target_bytes: u64,
    /// In bytes, given up.
    pub actual_bytes: u64,
}
