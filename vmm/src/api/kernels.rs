//! What the machine can be asked about its kernels.
//!
//! In: the body of a request. Out: a [`SwitchRequest`] whose parts fit each other. Holds: every path is absolute, since the VM's process
//! may have another working directory than who asks.

use super::routes::{absolute, parsed};
use super::{ApiError, mebibytes, printable};
use crate::kernel;
use crate::layout;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Which kernel is to run next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchRequest {
    /// One that sleeps; or else [`SwitchRequest::boot`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// One that is booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootRequest>,
    /// One that a snapshot has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<KeptKernel>,
    /// The file that the one that is awake will sleep in, absolute; memory if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_in: Option<PathBuf>,
    /// What a kernel that wakes up makes of the time it slept.
    #[serde(default)]
    pub time: SleptTime,
    /// Whether what the other writes to disks lies beside them until it is accepted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trial: bool,
}

/// A kernel to be booted beside those that sleep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootRequest {
    /// A bzImage or an ELF kernel, absolute.
    pub kernel: PathBuf,
    /// Its initial RAM disk, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// Guest RAM in bytes; as much as the awake one has if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// vCPUs; as many as the awake one has if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// What it will be called; after its version if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it gets the writable disks too.
    #[serde(default)]
    pub share_disks: bool,
    /// Makes it an image kernel, which is shown the one that falls asleep as its `/proc/vmcore`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRequest>,
}

/// A kernel that goes on from a snapshot, on the disks, taps and sockets of the one that is awake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptKernel {
    /// The snapshot, absolute.
    pub path: PathBuf,
    /// What it will be called; after its version if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it gets the writable disks too.
    #[serde(default)]
    pub share_disks: bool,
}

/// What an image kernel is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    /// The file that will be what it writes to its disk, absolute; without it there is no such disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_to: Option<PathBuf>,
}

/// What a kernel that wakes up makes of the time it slept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SleptTime {
    /// It has passed.
    #[default]
    Advance,
    /// It has not.
    Freeze,
}

/// A kernel that is to be dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetRequest {
    /// Its name.
    pub name: String,
}

/// A switch that has been made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchSummary {
    /// The kernel that sleeps now.
    pub from: String,
    /// Whether it does not, but has ended: an image kernel.
    #[serde(default)]
    pub from_ended: bool,
    /// The kernel that runs now.
    pub to: String,
    /// From when the one stood still until the other ran, in milliseconds.
    pub pause_ms: f64,
    /// Of that, writing the one to its file.
    pub saved_ms: f64,
}

/// One line for a person.
impl fmt::Display for SwitchSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (printable(&self.from), printable(&self.to));
        let became = if self.from_ended { "ended" } else { "sleeps" };
        write!(f, "{from} {became}, {to} runs after {:.1} ms", self.pause_ms)
    }
}

/// What was kept of a kernel on trial.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Bytes that its disks did not have.
    pub written_bytes: u64,
    /// How long its disks could not be used, in milliseconds.
    pub total_ms: f64,
}

/// One line for a person.
impl fmt::Display for Acceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} written to disks in {:.1} ms", mebibytes(self.written_bytes), self.total_ms)
    }
}

/// The kernels of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelList {
    /// The one that is awake first, then those that sleep.
    pub kernels: Vec<KernelStatus>,
}

/// A kernel of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// What it is called.
    pub name: String,
    /// What it said it is; none if it said nothing.
    pub version: Option<String>,
    /// Whether it sleeps.
    pub asleep: bool,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Bytes of the host's memory that it takes.
    pub resident_bytes: u64,
    /// How long it has been asleep, in seconds.
    pub asleep_seconds: f64,
    /// The file that it sleeps in; none in memory.
    pub kept_in: Option<PathBuf>,
    /// Whether it runs, or ran, beside the one that is awake.
    #[serde(default)]
    pub beside: bool,
    /// The vsock socket of one that runs beside, absolute; none without such a device.
    #[serde(default)]
    pub vsock: Option<PathBuf>,
    /// Why one that was booted beside runs no more.
    #[serde(default)]
    pub ended: Option<String>,
    /// Whether it is on trial.
    #[serde(default)]
    pub on_trial: bool,
}

/// A line for each kernel, for a person.
impl fmt::Display for KernelList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.kernels.iter().map(KernelStatus::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl fmt::Display for KernelStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.version.as_deref().map_or("unknown", kernel::release);
        let (name, version) = (printable(&self.name), printable(version));
        let (held, memory) = (mebibytes(self.resident_bytes), mebibytes(self.memory_bytes));
        write!(f, "{name}: {version}, {held} of {memory} held, ")?;
        match (self.asleep, &self.kept_in) {
            (false, _) if self.beside => match &self.ended {
                Some(why) => write!(f, "beside, has ended: {}", printable(why)),
                None => write!(f, "beside"),
            },
            (false, _) if self.on_trial => write!(f, "awake on trial"),
            (false, _) => write!(f, "awake"),
            (true, None) => write!(f, "asleep for {:.1} s", self.asleep_seconds),
            (true, Some(file)) => {
                let file = file.display().to_string();
                write!(f, "asleep for {:.1} s in {}", self.asleep_seconds, printable(&file))
            }
        }
    }
}

pub(super) fn boot_request(body: &[u8]) -> Result<BootRequest, ApiError> {
    let boot: BootRequest = parsed(body, "a kernel to boot")?;
    if boot.image.is_some() {
        return Err(ApiError::bad_request("no image kernel is booted beside another"));
    }
    check_boot(&boot).map(|()| boot)
}

/// Its files are absolute, and it has a number of vCPUs that there can be.
fn check_boot(boot: &BootRequest) -> Result<(), ApiError> {
    if let Some(vcpus) = boot.vcpus.filter(|vcpus| !layout::VCPUS.contains(vcpus)) {
        return Err(ApiError::bad_request(format!("{vcpus} vCPUs: expected 1 to 16")));
    }
    let image = boot.image.as_ref().and_then(|image| image.write_to.as_deref());
    [Some(boot.kernel.as_path()), boot.initrd.as_deref(), image].into_iter().flatten().try_for_each(absolute)
}

pub(super) fn switch_request(body: &[u8]) -> Result<SwitchRequest, ApiError> {
    let request: SwitchRequest = parsed(body, "a switch request")?;
    let SwitchRequest { to, boot, snapshot, .. } = &request;
    if [to.is_some(), boot.is_some(), snapshot.is_some()].into_iter().filter(|&given| given).count() != 1 {
        return Err(ApiError::bad_request("expected one of `to`, `boot` and `snapshot`"));
    }
    boot.as_ref().map_or(Ok(()), check_boot)?;
    let kept = snapshot.as_ref().map(|kept| kept.path.as_path());
    [request.keep_in.as_deref(), kept].into_iter().flatten().try_for_each(absolute)?;
    Ok(request)
}
