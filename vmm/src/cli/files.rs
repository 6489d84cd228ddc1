//! The verbs that write snapshots, dumps and archives, and those that read them.
//!
//! In: arguments. Out: checked values. Holds: what is written has a name of its own, beside what is read.

use super::Remote;
use crate::api::Then;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Saves a running VM to a file: memory, vCPUs and devices as of one instant.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// The snapshot to write; one of that name is replaced once the new one is whole
    pub file: PathBuf,
    /// What the VM does afterwards; without it, what it did before
    #[arg(long, value_enum)]
    pub then: Option<ThenChoice>,
    /// Keep a copy of each disk beside the snapshot
    #[arg(long)]
    pub with_disks: bool,
    /// Read all of each disk for a digest, by which an unchanged one is known in another place
    #[arg(long)]
    pub digest_disks: bool,
    /// Write only what changed since this snapshot, which the new one then needs; see docs/snapshots.md for when that is known
    #[arg(long, value_name = "FILE")]
    pub parent: Option<PathBuf>,
    /// From now on watch what is written into the VM's RAM, so that while it runs on this snapshot, and each later one, can be a `--parent`
    #[arg(long)]
    pub track: bool,
    /// Save the kernel of this name, which runs beside (vmm prepare), and not the one that is awake
    #[arg(long, value_name = "NAME", conflicts_with_all = ["then", "with_disks", "digest_disks", "parent", "track", "key", "live", "compress"])]
    pub kernel: Option<String>,
    /// Seal it with this key, a file of 32 random bytes or more, by which `vmm restore --key` tells it from others'
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Let the VM run on while its RAM, as it is now, is written
    #[arg(long, conflicts_with_all = ["then", "digest_disks"])]
    pub live: bool,
    /// Write an archive, as `vmm pack` does; it takes room for both for a while. Nothing runs from it, and it shares no memory
    #[arg(long, value_enum, value_name = "HOW", conflicts_with_all = ["with_disks", "parent", "track"])]
    pub compress: Option<CompressChoice>,
}

/// What a VM does after its snapshot.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ThenChoice {
    /// Goes on
    Resume,
    /// Stays paused
    Pause,
    /// Ends
    Stop,
}

impl From<ThenChoice> for Then {
    fn from(choice: ThenChoice) -> Self {
        match choice {
            ThenChoice::Resume => Self::Resume,
            ThenChoice::Pause => Self::Pause,
            ThenChoice::Stop => Self::Stop,
        }
    }
}

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompressChoice {
    /// Zstandard, in the seekable format
    Zstd,
}

/// Writes a running VM's memory and registers to a file for crash, drgn or gdb; the VM goes on.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// The dump to write; one of that name is replaced once the new one is whole
    pub file: PathBuf,
}

/// Compresses a snapshot that is kept for long: a Zstandard file, from which nothing runs.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The snapshot
    pub snapshot: PathBuf,
    /// The archive to write; one of that name is replaced once the new one is whole
    pub archive: PathBuf,
}

/// Makes a snapshot of what `vmm pack` wrote.
#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// The archive
    pub archive: PathBuf,
    /// The snapshot to write; one of that name is replaced once the new one is whole
    pub snapshot: PathBuf,
    /// Refuse a snapshot that was not written with this key
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// Makes one full snapshot of one that needs others.
#[derive(Debug, Args)]
pub struct FlattenArgs {
    /// The last of a chain of snapshots
    pub chain: PathBuf,
    /// The snapshot to write; one of that name is replaced once the new one is whole
    pub out: PathBuf,
    /// Refuse a chain that was not written with this key, and seal the new one with it
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// Reads every byte of a snapshot, and of those that it needs, and checks it.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The snapshot
    pub file: PathBuf,
    /// Refuse one that was not written with this key
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Says what a snapshot is, what it has and what it needs.
#[derive(Debug, Args)]
pub struct File {
    /// The snapshot
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
