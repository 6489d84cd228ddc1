//! Why a switch did not happen.
//!
//! In: what failed. Out: one line that says so. Holds: a kernel is named as its user named it.

use super::adopt::AdoptError;
use crate::disk::{DiskError, DisksError};
use crate::kvm::Ioctl;
use crate::load::LoadError;
use crate::ram::RamError;
use crate::restore::RestoreError;
use crate::save::SaveError;
use crate::start::StartError;
use snapshot::VerifyError;
use snapshot::publish::PublishError;
use std::io;
use std::path::PathBuf;

/// Why no other kernel is awake. The one that was goes on, unless the error says that it can't.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// A name that is in use, or none.
    #[error("kernel name `{0}`: expected a printable name that no other kernel here has")]
    BadName(String),
    /// Nobody sleeps under this name.
    #[error("no kernel `{name}` sleeps here: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// What it is shown is no part of it.
    #[error("kernel `{0}` is an image kernel, which can't be kept")]
    ImageKernel(String),
    /// An image kernel has windows on it.
    #[error("kernel `{0}` can't be dropped while an image kernel is shown it")]
    Shown(String),
    /// The guest has asked for its end.
    #[error("the VM is ending")]
    Ending,
    /// The state of the one that is awake can't be read.
    #[error(transparent)]
    Capture(#[from] Ioctl),
    /// The one that is awake can't be written to a file.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The disks of the one that is awake can't be synced.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// A kernel that can't be booted.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A sleeper's file.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A state that this host would not take.
    #[error("kernel `{name}` cannot wake up")]
    Wake {
        /// Which.
        name: String,
        /// Why.
        source: RestoreError,
    },
    /// A kernel from elsewhere, which this machine is not for.
    #[error("kernel `{name}` cannot have this VM")]
    Adopt {
        /// Which.
        name: String,
        /// Why.
        source: AdoptError,
    },
    /// One at a time.
    #[error("kernel `{0}` runs beside already: `vmm forget` drops it")]
    Busy(String),
    /// Nobody runs beside under this name.
    #[error("no kernel `{0}` runs beside")]
    NotBeside(String),
    /// It ran beside, and has ended.
    #[error("kernel `{name}` ended before it was switched to: {why}")]
    EndedBeside {
        /// Which.
        name: String,
        /// How.
        why: String,
    },
    /// Nothing can stand in for a disk.
    #[error("disk `{disk}`: nothing can stand in for it")]
    StandIn {
        /// The disk's id.
        disk: String,
        /// What the host said.
        source: io::Error,
    },
    /// It may turn out never to have run.
    #[error("kernel `{0}` is on trial: `vmm accept` keeps what it wrote, and a switch back drops it")]
    OnTrial(String),
    /// There is nothing to accept.
    #[error("kernel `{0}` is not on trial")]
    NotOnTrial(String),
    /// Who slept would lose what was before.
    #[error("kernel `{0}` has run here before: expected a new one to go on trial")]
    NotNew(String),
    /// There is no place for what is written on trial.
    #[error("disk `{disk}`: no place for what is written on trial")]
    NoTrial {
        /// The disk's id.
        disk: String,
        /// What the host said.
        source: io::Error,
    },
    /// A disk has no room for what was written on trial.
    #[error("disk `{disk}` has no room for what was written on trial, and stays as it was")]
    NoRoom {
        /// The disk's id.
        disk: String,
        /// What the host said.
        source: io::Error,
    },
    /// A disk has a part of what was written on trial.
    #[error(
        "disk `{disk}` could not be written whole: kernel `{name}` goes on on trial, and no other can have that disk"
    )]
    HalfAccepted {
        /// The disk's id.
        disk: String,
        /// Whose writes they are.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// A disk that a sleeper would find changed.
    #[error("kernel `{name}` cannot wake up: its disk `{disk}` was written while it slept")]
    Stale {
        /// Which.
        name: String,
        /// The disk's id.
        disk: String,
    },
    /// A disk's stamp can't be read.
    #[error("disk `{disk}`: cannot see whether it was written")]
    Stamp {
        /// Which.
        disk: String,
        /// What the host said.
        source: io::Error,
    },
    /// An image kernel can't be shown the one that sleeps.
    #[error("cannot show the image kernel what it is for: {0}")]
    Window(#[source] RamError),
    /// The file that an image kernel is to write can't be made or named.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The file can't be made long enough.
    #[error("cannot make {} the image kernel's disk", path.display())]
    ImageFile {
        /// Which.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file can't be a disk.
    #[error(transparent)]
    ImageDisk(DiskError),
    /// What the image kernel wrote is no snapshot.
    #[error(transparent)]
    Image(#[from] VerifyError),
    /// What the image kernel wrote is damaged.
    #[error(transparent)]
    ImageRam(#[from] snapshot::RamError),
    /// A restart without something to restart from.
    #[error("this kernel was given no disk to write an image to")]
    NoImage,
    /// Neither the new nor the old kernel can run.
    #[error("{first}; and the kernel that was awake cannot go on: {second}")]
    Both {
        /// Why the new one can't.
        first: String,
        /// Why the old one can't.
        second: String,
    },
}
