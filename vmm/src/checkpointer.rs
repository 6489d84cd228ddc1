//! `vmm-checkpoint`, the program in a guest that stops processes, writes them down and brings them back: what all who run it there have
//! in common.
//!
//! In: how it ended. Out: why it failed, as a person is told. Holds: what it complained of itself comes first.

use crate::tail::Tail;
use agent::{ClientError, Ended};

/// Its name, on the PATH of the guest's agent.
pub(crate) const PROGRAM: &str = "vmm-checkpoint";
/// Bytes that are kept of each of its streams.
pub(crate) const KEPT: usize = 64 << 10;

/// Why it failed, if it did: its last line, or how it ended.
pub(crate) fn failure(ended: Ended, complaint: &Tail) -> Option<String> {
    let silent = match ended {
        Ended::Exited(0) => return None,
        Ended::Exited(status) => format!("{PROGRAM} ended with status {status}"),
        Ended::Signalled(signal) => format!("{PROGRAM} was ended by signal {signal}"),
    };
    Some(complaint.last_line().unwrap_or(silent))
}

/// Whether the guest has no such program.
pub(crate) fn is_missing(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused(why) if why.errno == libc::ENOENT)
}
