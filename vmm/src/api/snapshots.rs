//! Snapshots and dumps, as they are asked for and told of.
//!
//! In: a JSON body. Out: a request that makes sense, or why it makes none; what was written. Holds: paths are absolute.

use super::routes::{absolute, parsed};
use super::{ApiError, mebibytes, printable};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

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

pub(super) fn snapshot_request(body: &[u8]) -> Result<SnapshotRequest, ApiError> {
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

pub(super) fn dump_request(body: &[u8]) -> Result<DumpRequest, ApiError> {
    let request: DumpRequest = parsed(body, "a dump request")?;
    absolute(&request.path).map(|()| request)
}
