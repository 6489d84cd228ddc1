//! What the machine can be asked about its kernels.
//!
//! In: the body of a request. Out: a [`SwitchRequest`] whose parts fit each other. Holds: every path is absolute, since the VM's process
//! may have another working directory than who asks.

use super::{ApiError, mebibytes, parsed, printable};
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
    /// The file that the one that is awake will sleep in, absolute; memory if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_in: Option<PathBuf>,
    /// What a kernel that wakes up makes of the time it slept.
    #[serde(default)]
    pub time: SleptTime,
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
            (false, _) => write!(f, "awake"),
            (true, None) => write!(f, "asleep for {:.1} s", self.asleep_seconds),
            (true, Some(file)) => {
                let file = file.display().to_string();
                write!(f, "asleep for {:.1} s in {}", self.asleep_seconds, printable(&file))
            }
        }
    }
}

pub(super) fn switch_request(body: &[u8]) -> Result<SwitchRequest, ApiError> {
    let request: SwitchRequest = parsed(body, "a switch request")?;
    if request.to.is_some() == request.boot.is_some() {
        return Err(ApiError::bad_request("expected one of `to` and `boot`"));
    }
    if let Some(vcpus) = request.boot.as_ref().and_then(|boot| boot.vcpus)
        && !layout::VCPUS.contains(&vcpus)
    {
        return Err(ApiError::bad_request(format!("{vcpus} vCPUs: expected 1 to 16")));
    }
    let written = |boot: &BootRequest| boot.image.as_ref()?.write_to.clone();
    let files =
        request.boot.iter().flat_map(|boot| [Some(boot.kernel.clone()), boot.initrd.clone(), written(boot)]);
    let files = files.chain([request.keep_in.clone()]);
    if let Some(path) = files.flatten().find(|path| !path.is_absolute()) {
        return Err(ApiError::bad_request(format!("path must be absolute: {}", path.display())));
    }
    Ok(request)
}
