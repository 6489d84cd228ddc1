//! What a running VM can be asked from outside, and how that looks as HTTP.
//!
//! In: a method, a path and a JSON body. Out: a [`Command`] for the machine's loop, and its [`Reply`] as a status and a
//! JSON body. Holds: [`ENDPOINTS`] is the only list of routes; the server, the client and `docs/openapi.yaml` agree with
//! it (tested).
//!
//! Rooms: what is asked and answered, of kernels, of snapshots, of the machine's status; and how all of it looks as HTTP.

mod kernels;
mod routes;
mod snapshots;
mod status;

pub use kernels::{
    Acceptance, BootRequest, ForgetRequest, ImageRequest, KeptKernel, KernelList, KernelStatus, SleptTime,
    SwitchRequest, SwitchSummary,
};
pub use routes::{ENDPOINTS, ErrorBody, Operation, command, request, response};
pub use snapshots::{DumpRequest, SnapshotRequest, SnapshotSummary, Then};
pub use status::{BalloonStatus, NetworkStatus, RunState, Status};

use crate::progress::SavedSoFar;
use serde::{Deserialize, Serialize};
use std::sync::mpsc::Sender;

/// A request to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// What the machine is, and whether it runs.
    Status,
    /// How far the snapshot that is being written has got.
    Progress,
    /// Stop the vCPUs, keeping everything. No error if they are stopped.
    Pause,
    /// Let the vCPUs run. No error if they run.
    Resume,
    /// Ask the guest for memory.
    Balloon(BalloonRequest),
    /// Put the kernel that is awake to sleep, and have another run.
    Switch(SwitchRequest),
    /// List the kernels.
    Kernels,
    /// Drop a kernel that sleeps.
    Forget(ForgetRequest),
    /// Boot a kernel beside the one that is awake.
    Prepare(BootRequest),
    /// Keep what the kernel that is awake has written on trial.
    Accept,
    /// Write a snapshot.
    Snapshot(SnapshotRequest),
    /// Write a dump.
    Dump(DumpRequest),
    /// End the kernel that is awake; and with it, if no other sleeps, the machine and the process.
    Stop(StopRequest),
}

/// How much memory the guest is to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// In bytes, in all.
    pub target_bytes: u64,
}

/// What is to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// All kernels, those that sleep too.
    #[serde(default)]
    pub all: bool,
}

/// What the machine answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// To [`Command::Status`].
    Status(Status),
    /// To [`Command::Progress`].
    Progress(SavedSoFar),
    /// It is done, and there is no more to say.
    Done,
    /// To [`Command::Snapshot`] and [`Command::Dump`].
    Snapshot(SnapshotSummary),
    /// To [`Command::Switch`].
    Switched(SwitchSummary),
    /// To [`Command::Kernels`].
    Kernels(KernelList),
    /// To [`Command::Prepare`].
    Prepared(KernelStatus),
    /// To [`Command::Accept`].
    Accepted(Acceptance),
}

/// Why the machine did not do it: an HTTP status and one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status, 400 or above.
    pub status: u16,
    /// What was wrong and what was expected.
    pub message: String,
}

impl ApiError {
    /// The request itself is wrong (400).
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into() }
    }

    /// The request doesn't fit the machine's present state (409).
    pub fn conflict(message: impl Into<String>) -> Self {
        Self { status: 409, message: message.into() }
    }

    /// It was tried and failed (500).
    pub fn failed(message: impl Into<String>) -> Self {
        Self { status: 500, message: message.into() }
    }

    /// The machine is ending, and answers no more (503).
    pub fn ending() -> Self {
        Self { status: 503, message: "the VM is ending".into() }
    }
}

/// A command on its way to the machine's loop.
#[derive(Debug)]
pub struct ApiCall {
    /// What to do.
    pub command: Command,
    /// Where the answer goes. Dropped unused, the caller is told that the VM is ending.
    pub reply: Sender<Result<Reply, ApiError>>,
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests;
