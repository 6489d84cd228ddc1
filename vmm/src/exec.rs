//! `vmm exec`: a command in the guest, by way of the guest's agent.
//!
//! In: a vsock socket, or the control socket of a VM that has one; a command; our standard streams. Out: the command's exit
//! status. Holds: our own failures have a status of their own; when we end, so does the command.

use crate::api::{Command, Reply};
use crate::cli::{ExecArgs, GuestAddress};
use crate::client::{self, ClientError};
use agent::{Client, Ended, Streams};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What we end with when we can't tell how the command ended, as env(1) and `docker exec` do.
pub const FAILED: u8 = 125;
/// The command can't be run.
const CANNOT_RUN: u8 = 126;
/// There is no such command.
const NOT_FOUND: u8 = 127;
/// A signal's number is added to this.
const SIGNALLED: u8 = 128;
/// How long the guest's agent may take to answer; a busy guest is slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the command's end is unknown.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The VM can't be asked.
    #[error(transparent)]
    Api(#[from] ClientError),
    /// The VM has no vsock device.
    #[error("this VM has no vsock device: start it with --vsock PATH")]
    NoVsock,
    /// The guest's agent can't be asked, or has refused.
    #[error(transparent)]
    Agent(#[from] agent::ClientError),
}

impl ExecError {
    /// The exit status that tells of it.
    pub fn status(&self) -> u8 {
        match self {
            Self::Agent(agent::ClientError::Refused(complaint)) => match complaint.errno {
                0 => FAILED,
                libc::ENOENT => NOT_FOUND,
                _ => CANNOT_RUN,
            },
            _ => FAILED,
        }
    }
}

/// Runs the command with our standard streams and returns the status to end with: the command's own, or 128 and the signal
/// that ended it.
///
/// # Errors
/// See [`ExecError`].
pub fn run(args: &ExecArgs) -> Result<u8, ExecError> {
    let client = Client::new(&vsock(&args.guest)?, PATIENCE);
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams { stdin: Box::new(io::stdin()), stdout: &mut stdout, stderr: &mut stderr };
    Ok(match client.exec(&args.command, streams)? {
        Ended::Exited(status) => status,
        Ended::Signalled(signal) => SIGNALLED.saturating_add(signal),
    })
}

/// Where the guest's vsock device is.
///
/// # Errors
/// The VM can't be asked, or has none.
pub fn vsock(guest: &GuestAddress) -> Result<PathBuf, ExecError> {
    match (&guest.vsock, &guest.api) {
        (Some(path), _) => Ok(path.clone()),
        (None, api) => vsock_of(api.as_deref().unwrap_or(Path::new(""))),
    }
}

/// Where the vsock device of this VM is.
///
/// # Errors
/// The VM can't be asked, or has none.
pub fn vsock_of(api: &Path) -> Result<PathBuf, ExecError> {
    match client::call(api, &Command::Status)? {
        Reply::Status(status) => status.vsock.ok_or(ExecError::NoVsock),
        _ => Err(ExecError::NoVsock),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::message::Complaint;

    #[test]
    fn a_command_that_cannot_be_run_is_told_by_the_status() {
        let refused = |errno| {
            let complaint = Complaint { errno, text: "why".into() };
            ExecError::from(agent::ClientError::Refused(complaint)).status()
        };
        assert_eq!([libc::ENOENT, libc::EACCES, libc::ENOEXEC, 0].map(refused), [127, 126, 126, 125]);
        assert_eq!(ExecError::from(agent::ClientError::Lost).status(), 125);
        assert_eq!(ExecError::NoVsock.status(), 125);
    }
}
