//! The verbs that speak to a running VM: connect, ask, print.
//!
//! In: the path of a VM's API socket and a [`Command`]. Out: its answer, for a person or as JSON. Holds: whatever fails is
//! told in one line that names the socket.

use crate::api::{
    self, Acceptance, Command, DumpRequest, ErrorBody, KernelList, KernelStatus, Reply, SnapshotRequest,
    SnapshotSummary, Status, SwitchSummary, Then,
};
use crate::disk::DiskCare;
use crate::http::{Connection, HttpError, Response};
use crate::progress::SavedSoFar;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a VM may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to write a snapshot.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(3600);
/// How long a message may take on its way.
const MESSAGE_TIME: Duration = Duration::from_secs(10);

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing has that name.
    #[error("no API socket at {}: the VM may have ended", .0.display())]
    NoSocket(PathBuf),
    /// The file is there, but nobody listens.
    #[error("nobody answers at API socket {}: the VM has ended", .0.display())]
    NobodyThere(PathBuf),
    /// The path of a snapshot or a dump can't be sent.
    #[error("path cannot be sent: {path}: {reason}", path = path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The VM took too long.
    #[error("no answer within {seconds} s at API socket {path}", path = path.display())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        seconds: u64,
    },
    /// The connection failed.
    #[error("API socket {path}: {source}", path = path.display())]
    Connection {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody answers, but not in our language.
    #[error("API socket {path} does not speak the VM control API: {reason}", path = path.display())]
    NotTheApi {
        /// The socket.
        path: PathBuf,
        /// What was wrong with its answer.
        reason: String,
    },
    /// The VM's own words.
    #[error("{0}")]
    Refused(String),
    /// The answer could not be printed.
    #[error("cannot print the answer: {0}")]
    Print(#[source] io::Error),
}

/// A snapshot command; a relative path is taken from here, not from the VMM's directory. A live snapshot is one that `care` wants at once.
///
/// # Errors
/// The path is empty, or there is no current directory.
pub fn snapshot(
    path: &Path,
    then: Option<Then>,
    care: DiskCare,
    (parent, key): (Option<&Path>, Option<&Path>),
    track: bool,
) -> Result<Command, ClientError> {
    let [parent, key] = [parent, key].map(|other| other.map(absolute).transpose());
    let (path, parent, key) = (absolute(path)?, parent?, key?);
    let DiskCare { keep: with_disks, digest: digest_disks, at_once: live } = care;
    Ok(Command::Snapshot(SnapshotRequest {
        path,
        then,
        with_disks,
        digest_disks,
        parent,
        track,
        key,
        live,
        kernel: None,
    }))
}

/// A snapshot command for a kernel that runs beside.
///
/// # Errors
/// As [`snapshot()`].
pub fn snapshot_beside(path: &Path, kernel: &str) -> Result<Command, ClientError> {
    Ok(Command::Snapshot(SnapshotRequest {
        path: absolute(path)?,
        then: None,
        with_disks: false,
        digest_disks: false,
        parent: None,
        track: false,
        key: None,
        live: false,
        kernel: Some(kernel.to_owned()),
    }))
}

/// A dump command, as [`snapshot()`].
///
/// # Errors
/// As [`snapshot()`].
pub fn dump(path: &Path) -> Result<Command, ClientError> {
    absolute(path).map(|path| Command::Dump(DumpRequest { path }))
}

fn absolute(path: &Path) -> Result<PathBuf, ClientError> {
    let failed = |e: io::Error| ClientError::Path { path: path.into(), reason: e.to_string() };
    std::path::absolute(path).map_err(failed)
}

/// Asks the VM behind `socket`, and prints its answer to `out`: lines for a person, or one line of JSON.
///
/// # Errors
/// There was no answer, or the VM refused.
pub fn run(socket: &Path, command: &Command, json: bool, out: &mut dyn Write) -> Result<(), ClientError> {
    let reply = call(socket, command)?;
    let text = if json { as_json(&reply, command) } else { as_text(&reply, command) };
    writeln!(out, "{text}").map_err(ClientError::Print)
}

/// Asks the VM behind `socket`.
///
/// # Errors
/// There was no answer, or the VM refused.
pub fn call(socket: &Path, command: &Command) -> Result<Reply, ClientError> {
    let (method, path, body) = api::request(command).map_err(|e| cannot_send(command, &e))?;
    let writes =
        matches!(command, Command::Snapshot(_) | Command::Dump(_) | Command::Switch(_) | Command::Accept);
    let patience = if writes { SNAPSHOT_PATIENCE } else { PATIENCE };
    let failed = |source| ClientError::Connection { path: socket.into(), source };
    let mut connection = Connection::new(connect(socket)?, MESSAGE_TIME).map_err(failed)?;
    // A server that turns us away may close before it has read the request: its answer says why.
    let sent = connection.send_request(method, path, &body);
    match (connection.response(patience), sent) {
        (Ok(response), _) => reply(socket, command, &response),
        (Err(_), Err(e)) => Err(failed(e)),
        (Err(e), Ok(())) => Err(no_response(socket, e, patience)),
    }
}

fn cannot_send(command: &Command, error: &serde_json::Error) -> ClientError {
    let path = match command {
        Command::Snapshot(request) => request.path.clone(),
        Command::Dump(request) => request.path.clone(),
        _ => PathBuf::new(),
    };
    ClientError::Path { path, reason: error.to_string() }
}

fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    UnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ClientError::NoSocket(socket.into()),
        io::ErrorKind::ConnectionRefused => ClientError::NobodyThere(socket.into()),
        _ => ClientError::Connection { path: socket.into(), source },
    })
}

fn no_response(socket: &Path, error: HttpError, patience: Duration) -> ClientError {
    let path = socket.into();
    match error {
        HttpError::TimedOut => ClientError::TimedOut { path, seconds: patience.as_secs() },
        HttpError::Refused { message, .. } => ClientError::NotTheApi { path, reason: message },
        HttpError::Io(source) => ClientError::Connection { path, source },
    }
}

fn reply(socket: &Path, command: &Command, response: &Response) -> Result<Reply, ClientError> {
    let strange =
        |e: serde_json::Error| ClientError::NotTheApi { path: socket.into(), reason: e.to_string() };
    match (response.status, command) {
        (204, _) => Ok(Reply::Done),
        (200, Command::Status) => parse::<Status>(response).map(Reply::Status).map_err(strange),
        (200, Command::Switch(_)) => parse::<SwitchSummary>(response).map(Reply::Switched).map_err(strange),
        (200, Command::Prepare(_)) => parse::<KernelStatus>(response).map(Reply::Prepared).map_err(strange),
        (200, Command::Progress) => parse::<SavedSoFar>(response).map(Reply::Progress).map_err(strange),
        (200, Command::Accept) => parse::<Acceptance>(response).map(Reply::Accepted).map_err(strange),
        (200, Command::Kernels) => parse::<KernelList>(response).map(Reply::Kernels).map_err(strange),
        (200, _) => parse::<SnapshotSummary>(response).map(Reply::Snapshot).map_err(strange),
        _ => Err(ClientError::Refused(parse::<ErrorBody>(response).map_err(strange)?.error)),
    }
}

fn parse<T: serde::de::DeserializeOwned>(response: &Response) -> Result<T, serde_json::Error> {
    serde_json::from_slice(&response.body)
}

fn done_word(command: &Command) -> &'static str {
    match command {
        Command::Status | Command::Kernels => "answered",
        Command::Switch(_) => "switched",
        Command::Forget(_) => "forgotten",
        Command::Prepare(_) => "booted",
        Command::Accept => "accepted",
        Command::Progress => "told",
        Command::Pause => "paused",
        Command::Resume => "resumed",
        Command::Snapshot(_) | Command::Dump(_) => "written",
        Command::Stop(_) => "stopped",
        Command::Balloon(_) => "asked",
    }
}

fn as_json(reply: &Reply, command: &Command) -> String {
    let text = match reply {
        Reply::Status(status) => serde_json::to_string(status),
        Reply::Snapshot(summary) => serde_json::to_string(summary),
        Reply::Switched(summary) => serde_json::to_string(summary),
        Reply::Kernels(list) => serde_json::to_string(list),
        Reply::Prepared(kernel) => serde_json::to_string(kernel),
        Reply::Accepted(acceptance) => serde_json::to_string(acceptance),
        Reply::Progress(saved) => serde_json::to_string(saved),
        Reply::Done => serde_json::to_string(&serde_json::json!({ "done": done_word(command) })),
    };
    // All of it came from JSON.
    text.unwrap_or_default()
}

fn as_text(reply: &Reply, command: &Command) -> String {
    match reply {
        Reply::Snapshot(summary) if matches!(command, Command::Dump(_)) && !summary.vmcoreinfo => {
            format!("{summary}; crash and drgn need VMCOREINFO, and the guest has none")
        }
        Reply::Status(status) => status.to_string(),
        Reply::Snapshot(summary) => summary.to_string(),
        Reply::Switched(summary) => summary.to_string(),
        Reply::Kernels(list) => list.to_string(),
        Reply::Prepared(kernel) => kernel.to_string(),
        Reply::Accepted(acceptance) => acceptance.to_string(),
        Reply::Progress(saved) => format!("{} of {}", saved.done_bytes, saved.total_bytes),
        Reply::Done => done_word(command).into(),
    }
}
