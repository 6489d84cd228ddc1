//! What a running VM can be asked from outside, and how that looks as HTTP.
//!
//! In: a method, a path and a JSON body. Out: a [`Command`] for the machine's loop, and its [`Reply`] as a status and a
//! JSON body. Holds: [`ENDPOINTS`] is the only list of routes; the server, the client and `docs/openapi.yaml` agree with
//! it (tested).

mod kernels;

pub use kernels::{
    Acceptance, BootRequest, ForgetRequest, ImageRequest, KeptKernel, KernelList, KernelStatus, SleptTime,
    SwitchRequest, SwitchSummary,
};

use crate::progress::SavedSoFar;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
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

/// How much memory the guest was asked for, and how much it says it has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// In bytes, asked for.
    pub target_bytes: u64,
    /// In bytes, given up.
    pub actual_bytes: u64,
}

/// What is to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// All kernels, those that sleep too.
    #[serde(default)]
    pub all: bool,
}

/// Where a snapshot goes, and what becomes of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The snapshot file; absolute.
    pub path: PathBuf,
    /// What the machine does once the snapshot is written; without it, what it did before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<Then>,
    /// Whether the disks are kept beside the snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub with_disks: bool,
    /// Whether all of each disk is read for a digest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub digest_disks: bool,
    /// The snapshot to which this one is a difference, absolute; without it all is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    /// Whether it is watched from now on what is written into RAM, so that later snapshots can be differences to this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub track: bool,
    /// The file with the key that seals it, absolute; without it, it is not sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Whether the guest runs on while its RAM is written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live: bool,
    /// The kernel that runs beside, rather than the one that is awake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
}

/// Where a dump goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DumpRequest {
    /// The file; absolute.
    pub path: PathBuf,
}

/// What a machine does after its snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// It runs on.
    Resume,
    /// It stays paused.
    Pause,
    /// It ends, and the process with it.
    Stop,
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
    /// They are stopped until [`Command::Resume`].
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

/// A snapshot that is on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// The file.
    pub path: PathBuf,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Bytes of guest RAM that the file holds; the others are zero, or a parent's.
    pub stored_bytes: u64,
    /// Whether crash, drgn and makedumpfile find in it what they need to know of a Linux kernel.
    #[serde(default)]
    pub vmcoreinfo: bool,
    /// How long the vCPUs stood still, in milliseconds; none if they still do.
    pub pause_ms: Option<f64>,
    /// How long it all took, in milliseconds.
    pub total_ms: f64,
}

/// One line for a person.
impl fmt::Display for SnapshotSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display().to_string();
        let (stored, memory) = (mebibytes(self.stored_bytes), mebibytes(self.memory_bytes));
        write!(f, "{}: {stored} of {memory} RAM stored in {:.0} ms, ", printable(&path), self.total_ms)?;
        match self.pause_ms {
            Some(ms) => write!(f, "the VM stood still for {ms:.1} ms"),
            None => write!(f, "the VM did not go on"),
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
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

/// Which [`Command`] a route stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Command::Status`]
    Status,
    /// [`Command::Pause`]
    Pause,
    /// [`Command::Resume`]
    Resume,
    /// [`Command::Snapshot`]
    Snapshot,
    /// [`Command::Dump`]
    Dump,
    /// [`Command::Stop`]
    Stop,
    /// [`Command::Balloon`]
    Balloon,
    /// [`Command::Switch`]
    Switch,
    /// [`Command::Kernels`]
    Kernels,
    /// [`Command::Forget`]
    Forget,
    /// [`Command::Prepare`]
    Prepare,
    /// [`Command::Accept`]
    Accept,
    /// [`Command::Progress`]
    Progress,
}

/// Every route: method, path, operation. Named as Cloud Hypervisor's are.
pub const ENDPOINTS: [(&str, &str, Operation); 13] = [
    ("GET", "/api/v1/vm.info", Operation::Status),
    ("PUT", "/api/v1/vm.pause", Operation::Pause),
    ("PUT", "/api/v1/vm.resume", Operation::Resume),
    ("PUT", "/api/v1/vm.snapshot", Operation::Snapshot),
    ("PUT", "/api/v1/vm.dump", Operation::Dump),
    ("PUT", "/api/v1/vm.stop", Operation::Stop),
    ("PUT", "/api/v1/vm.balloon", Operation::Balloon),
    ("PUT", "/api/v1/vm.switch", Operation::Switch),
    ("GET", "/api/v1/vm.kernels", Operation::Kernels),
    ("PUT", "/api/v1/vm.forget", Operation::Forget),
    ("PUT", "/api/v1/vm.prepare", Operation::Prepare),
    ("PUT", "/api/v1/vm.accept", Operation::Accept),
    ("GET", "/api/v1/vm.progress", Operation::Progress),
];

/// The body of every answer with a status of 400 or above.
#[derive(Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What was wrong, in one line.
    pub error: String,
}

/// The command that a request stands for.
///
/// # Errors
/// 404 for a path that isn't in [`ENDPOINTS`], 405 for the wrong method, 400 for a body that doesn't fit.
pub fn command(method: &str, path: &str, body: &[u8]) -> Result<Command, ApiError> {
    let Some((wanted, _, operation)) = ENDPOINTS.iter().find(|(_, p, _)| *p == path) else {
        return Err(ApiError { status: 404, message: format!("no such path: {path}") });
    };
    if method != *wanted {
        return Err(ApiError { status: 405, message: format!("{path} takes {wanted}, not {method}") });
    }
    let empty = || match body {
        [] => Ok(()),
        _ => Err(ApiError::bad_request(format!("{path} takes no body"))),
    };
    Ok(match operation {
        Operation::Snapshot => Command::Snapshot(snapshot_request(body)?),
        Operation::Dump => Command::Dump(dump_request(body)?),
        Operation::Balloon => Command::Balloon(parsed(body, "a balloon request")?),
        Operation::Switch => Command::Switch(kernels::switch_request(body)?),
        Operation::Forget => Command::Forget(parsed(body, "a name to forget")?),
        Operation::Prepare => Command::Prepare(kernels::boot_request(body)?),
        Operation::Accept => empty().map(|()| Command::Accept)?,
        Operation::Kernels => empty().map(|()| Command::Kernels)?,
        Operation::Status => empty().map(|()| Command::Status)?,
        Operation::Progress => empty().map(|()| Command::Progress)?,
        Operation::Pause => empty().map(|()| Command::Pause)?,
        Operation::Resume => empty().map(|()| Command::Resume)?,
        Operation::Stop => Command::Stop(stop_request(body)?),
    })
}

fn snapshot_request(body: &[u8]) -> Result<SnapshotRequest, ApiError> {
    let request: SnapshotRequest = parsed(body, "a snapshot request")?;
    absolute(&request.path)?;
    request.parent.as_deref().map_or(Ok(()), absolute)?;
    request.key.as_deref().map_or(Ok(()), absolute)?;
    if request.live && request.then.is_some() {
        return Err(ApiError::bad_request(
            "a live snapshot is of a VM that does what it did before: no `then`",
        ));
    }
    if request.live && request.digest_disks {
        let why = "a live snapshot can't have disks read for digests: they change meanwhile";
        return Err(ApiError::bad_request(why));
    }
    if request.track && request.then == Some(Then::Stop) {
        return Err(ApiError::bad_request("a VM that is stopped can't be tracked: expected another `then`"));
    }
    let SnapshotRequest { then, with_disks, digest_disks, parent, track, key, live, .. } = &request;
    let others = parent.is_some() || key.is_some() || *track;
    let more = then.is_some() || *with_disks || *digest_disks || others || *live;
    if request.kernel.is_some() && more {
        return Err(ApiError::bad_request(
            "a kernel that runs beside is saved as it is: expected `path` only",
        ));
    }
    Ok(request)
}

fn dump_request(body: &[u8]) -> Result<DumpRequest, ApiError> {
    let request: DumpRequest = parsed(body, "a dump request")?;
    absolute(&request.path).map(|()| request)
}

fn absolute(path: &Path) -> Result<(), ApiError> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(ApiError::bad_request(format!("path must be absolute: {}", path.display()))),
    }
}

fn stop_request(body: &[u8]) -> Result<StopRequest, ApiError> {
    if body.is_empty() { Ok(StopRequest::default()) } else { parsed(body, "a stop request") }
}

fn parsed<T: serde::de::DeserializeOwned>(body: &[u8], what: &str) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError::bad_request(format!("the body is not {what}: {e}")))
}

/// The request that stands for a command: method, path, body. [`command`]'s other half.
///
/// # Errors
/// A snapshot path that isn't UTF-8, which JSON can't carry.
pub fn request(command: &Command) -> Result<(&'static str, &'static str, Vec<u8>), serde_json::Error> {
    let (operation, body) = match command {
        Command::Status => (Operation::Status, Vec::new()),
        Command::Progress => (Operation::Progress, Vec::new()),
        Command::Pause => (Operation::Pause, Vec::new()),
        Command::Resume => (Operation::Resume, Vec::new()),
        Command::Stop(request) => (Operation::Stop, serde_json::to_vec(request)?),
        Command::Snapshot(request) => (Operation::Snapshot, serde_json::to_vec(request)?),
        Command::Dump(request) => (Operation::Dump, serde_json::to_vec(request)?),
        Command::Balloon(request) => (Operation::Balloon, serde_json::to_vec(request)?),
        Command::Switch(request) => (Operation::Switch, serde_json::to_vec(request)?),
        Command::Forget(request) => (Operation::Forget, serde_json::to_vec(request)?),
        Command::Prepare(request) => (Operation::Prepare, serde_json::to_vec(request)?),
        Command::Accept => (Operation::Accept, Vec::new()),
        Command::Kernels => (Operation::Kernels, Vec::new()),
    };
    let (method, path, _) = ENDPOINTS[operation as usize];
    Ok((method, path, body))
}

/// The HTTP status and JSON body for what the machine answered.
pub fn response(result: &Result<Reply, ApiError>) -> (u16, Vec<u8>) {
    let (status, body) = match result {
        Ok(Reply::Done) => return (204, Vec::new()),
        Ok(Reply::Status(status)) => (200, serde_json::to_vec(status)),
        Ok(Reply::Progress(saved)) => (200, serde_json::to_vec(saved)),
        Ok(Reply::Snapshot(summary)) => (200, serde_json::to_vec(summary)),
        Ok(Reply::Switched(summary)) => (200, serde_json::to_vec(summary)),
        Ok(Reply::Kernels(list)) => (200, serde_json::to_vec(list)),
        Ok(Reply::Prepared(kernel)) => (200, serde_json::to_vec(kernel)),
        Ok(Reply::Accepted(acceptance)) => (200, serde_json::to_vec(acceptance)),
        Err(e) => (e.status, serde_json::to_vec(&ErrorBody { error: e.message.clone() })),
    };
    // Only a path that isn't UTF-8 can fail to become JSON, and all paths here came from JSON.
    body.map_or((500, Vec::new()), |body| (status, body))
}

#[cfg(test)]
mod tests;
