//! The host's side of a vsock device: a socket file that clients come to.
//!
//! In: `PATH[,cid=N]` from the command line, a path from a snapshot. Out: the file, and the streams behind it. Holds: a path
//! that another process listens at is refused, and the file goes with the machine.

use crate::options::{Options, OptionsError};
use crate::socket_file::{PATH_MAX, SocketError, SocketFile};
use devices::virtio::{UnixVsock, VsockState};
use std::io;
use std::path::{Path, PathBuf};

/// The longest path: a port is added to it, at most `_4294967295`.
const LONGEST: usize = PATH_MAX - "_4294967295".len();
/// Unless the user says otherwise.
const DEFAULT_CID: u64 = 3;

/// A vsock device that a user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockWish {
    /// Where its socket file goes; absolute, since a snapshot may be restored elsewhere.
    pub path: PathBuf,
    /// The guest's context ID.
    pub cid: u64,
}

/// What is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockWishError {
    /// Options that are not its own.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// No place for a socket.
    #[error("path of {0} bytes: expected at most {LONGEST}, since `_` and a port are added")]
    TooLong(usize),
    /// There is no working directory to take it from.
    #[error("cannot tell the path from the root")]
    NoRoot(#[source] io::Error),
}

/// Why a device has no host side.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Somebody has it: most likely the machine that the snapshot is of, or its twin.
    #[error("vsock socket {} is in use by another process; --vsock PATH takes another", .0.display())]
    InUse(PathBuf),
    /// Any other reason why there is no file.
    #[error(transparent)]
    File(SocketError),
    /// No descriptors.
    #[error("cannot watch the vsock socket")]
    Watch(#[source] io::Error),
}

/// Reads `PATH[,cid=N]`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<VsockWish, VsockWishError> {
    let mut options = Options::parse(text, "path")?;
    let path = checked(&options.need("path")?)?;
    let cid = match options.take("cid") {
        None => DEFAULT_CID,
        Some(value) => parse_cid(value)?,
    };
    options.done("path, cid")?;
    Ok(VsockWish { path, cid })
}

/// Reads `PATH`, for a restored device, whose context ID its guest knows.
///
/// # Errors
/// What is wrong with it.
pub fn parse_path(text: &str) -> Result<PathBuf, VsockWishError> {
    let mut options = Options::parse(text, "path")?;
    let path = checked(&options.need("path")?)?;
    options.done("path")?;
    Ok(path)
}

fn checked(path: &str) -> Result<PathBuf, VsockWishError> {
    let path = std::path::absolute(path).map_err(VsockWishError::NoRoot)?;
    match path.as_os_str().len() {
        length if length > LONGEST => Err(VsockWishError::TooLong(length)),
        _ => Ok(path),
    }
}

fn parse_cid(value: String) -> Result<u64, OptionsError> {
    let cid = value.parse().ok().filter(|&cid| VsockState::new(cid).check().is_ok());
    cid.ok_or(OptionsError::BadValue { key: "cid", value, expected: "a number from 3 to 4294967294" })
}

/// Listens at `path`.
///
/// # Errors
/// The path can't be had, or the host has no descriptors.
pub fn open(path: &Path) -> Result<(SocketFile, UnixVsock), VsockError> {
    let (file, listener) = SocketFile::listen("vsock socket", path).map_err(|error| match error {
        SocketError::InUse { path, .. } => VsockError::InUse(path),
        other => VsockError::File(other),
    })?;
    let streams = UnixVsock::new(listener, path).map_err(VsockError::Watch)?;
    Ok((file, streams))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_path_and_a_context_id() {
        assert_eq!(parse("/run/v.sock").unwrap(), VsockWish { path: "/run/v.sock".into(), cid: 3 });
        assert_eq!(parse("/run/v.sock,cid=42").unwrap().cid, 42);
        assert_eq!(parse("path=/run/v.sock").unwrap().path, Path::new("/run/v.sock"));
        assert!(parse("v.sock").unwrap().path.is_absolute());
        assert_eq!(parse_path("/run/v.sock").unwrap(), Path::new("/run/v.sock"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(says("cid=3"), "`path=` is missing");
        assert_eq!(says("/v,cid=2"), "cid=2: expected a number from 3 to 4294967294");
        assert_eq!(says("/v,cid=4294967295"), "cid=4294967295: expected a number from 3 to 4294967294");
        assert_eq!(says("/v,port=2"), "unknown option `port`: expected path, cid");
        let long = format!("/{}", "x".repeat(LONGEST));
        assert_eq!(says(&long), "path of 97 bytes: expected at most 96, since `_` and a port are added");
        assert_eq!(parse_path("/v,cid=3").unwrap_err().to_string(), "unknown option `cid`: expected path");
    }

    #[test]
    fn a_path_that_another_has_is_refused_with_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let first = open(&path).unwrap();
        let refused = open(&path).unwrap_err().to_string();
        assert_eq!(
            refused,
            format!(
                "vsock socket {} is in use by another process; --vsock PATH takes another",
                path.display()
            )
        );
        drop(first);
        open(&path).unwrap();
    }
}
