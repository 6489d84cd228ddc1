//! How a request and its answer look as HTTP.
//!
//! In: a method, a path and a JSON body. Out: a [`Command`]; and of its [`Reply`] a status and a JSON body. Holds: [`ENDPOINTS`] is the
//! only list of routes.

use super::{ApiError, Command, Reply, StopRequest, kernels, snapshots};
use serde::{Deserialize, Serialize};
use std::path::Path;

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
        Operation::Snapshot => Command::Snapshot(snapshots::snapshot_request(body)?),
        Operation::Dump => Command::Dump(snapshots::dump_request(body)?),
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

fn stop_request(body: &[u8]) -> Result<StopRequest, ApiError> {
    if body.is_empty() { Ok(StopRequest::default()) } else { parsed(body, "a stop request") }
}

pub(super) fn absolute(path: &Path) -> Result<(), ApiError> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(ApiError::bad_request(format!("path must be absolute: {}", path.display()))),
    }
}

pub(super) fn parsed<T: serde::de::DeserializeOwned>(body: &[u8], what: &str) -> Result<T, ApiError> {
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
