//! What kernels are asked for, and what is told of them.
//!
//! In: nothing. Out: plain data, for those who ask. Holds: nothing here is a machine.

use super::image::ImageWish;
use crate::boot::BootSource;
use crate::clock::TimePolicy;
use crate::config::Shape;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A kernel that is to be booted.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// What it will be called; after its version if nothing is said.
    pub name: Option<String>,
    /// What is booted.
    pub source: BootSource,
    /// Bytes of RAM; as many as the awake one has if nothing is said.
    pub memory: Option<u64>,
    /// vCPUs; as many as the awake one has if nothing is said.
    pub vcpus: Option<u32>,
    /// Whether it gets the writable disks too.
    pub share_disks: bool,
    /// Whether it is an image kernel, and what for.
    pub image: Option<ImageWish>,
}

/// A kernel that a snapshot has, of another VM or of this one.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The snapshot.
    pub file: PathBuf,
    /// What it will be called; after its version if nothing is said.
    pub name: Option<String>,
    /// Whether it gets the writable disks too.
    pub share_disks: bool,
    /// What it makes of the time since the snapshot.
    pub time: TimePolicy,
}

/// Who is to be awake next.
#[derive(Clone, Debug)]
pub enum Next {
    /// A kernel that is booted.
    Boot(Newcomer),
    /// One that sleeps, with so much of the time it slept as the policy says.
    Wake(String, TimePolicy),
    /// One that goes on from a file, with the awake one's disks, taps and sockets.
    Snapshot(Kept),
}

/// What becomes of the two between whom is switched.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The file that the one that is awake will sleep in; memory if there is none.
    pub keep_in: Option<PathBuf>,
    /// Whether what the other writes to disks lies beside them until it is accepted.
    pub trial: bool,
}

/// What a switch took.
#[derive(Clone, Debug)]
pub struct Switched {
    /// Who was awake.
    pub from: String,
    /// Whether that one has ended; an image kernel: what it was shown moves on.
    pub ended: bool,
    /// Whether that one was on trial, and has ended: what it wrote is dropped.
    pub on_trial: bool,
    /// The file that it had not finished, which is dropped.
    pub unfinished: Option<PathBuf>,
    /// Who is.
    pub to: String,
    /// From when the old kernel stood still until the new one runs.
    pub pause: Duration,
    /// Of that, writing the old one to its file.
    pub saved: Duration,
}

/// One line for a person.
impl fmt::Display for Switched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, ended, on_trial, unfinished, to, .. } = self;
        if *on_trial {
            return write!(f, "vmm: kernel `{from}` ended on trial, nothing of it is left, `{to}` runs");
        }
        match (ended, unfinished) {
            (false, _) => write!(f, "vmm: kernel `{from}` sleeps, `{to}` runs"),
            (true, None) => write!(f, "vmm: image kernel `{from}` ended, `{to}` runs"),
            (true, Some(file)) => write!(
                f,
                "vmm: image kernel `{from}` ended, {} is unfinished and dropped, `{to}` runs",
                file.display()
            ),
        }
    }
}

/// A kernel, for a list.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    /// What it is called.
    pub name: String,
    /// What it is.
    pub shape: Shape,
    /// How long it has been asleep; none for the one that is awake.
    pub asleep: Option<Duration>,
    /// The file it sleeps in; none for one in memory.
    pub file: Option<PathBuf>,
    /// Bytes of the host's memory that its RAM takes.
    pub resident: u64,
    /// Whether it runs, or ran, beside the one that is awake.
    pub beside: bool,
    /// The vsock socket of one that runs beside.
    pub vsock: Option<PathBuf>,
    /// Why one that was booted beside runs no more.
    pub ended: Option<String>,
    /// Whether it is on trial.
    pub on_trial: bool,
}
