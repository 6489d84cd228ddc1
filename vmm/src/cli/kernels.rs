//! The verbs about a VM's kernels.
//!
//! In: arguments. Out: checked values. Holds: no verb can ask for two kernels at once.

use super::Remote;
use crate::api::SleptTime;
use crate::config::{parse_memory, parse_name, parse_vcpus};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Puts a running VM's kernel to sleep, and has another one run on the same devices: a new one, one that sleeps, or one of a snapshot.
#[derive(Debug, Args)]
#[group(id = "next", args = ["to", "kernel", "to_snapshot"], required = true, multiple = false)]
pub struct SwitchArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// Go back to a kernel that sleeps
    #[arg(long, value_name = "NAME", conflicts_with_all = ["name", "share_disks", "initrd", "memory", "cpus"])]
    pub to: Option<String>,
    /// Boot this kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Go on with the kernel of this snapshot, on the disks, taps and sockets of this VM
    #[arg(long, value_name = "FILE", conflicts_with_all = ["initrd", "memory", "cpus"])]
    pub to_snapshot: Option<PathBuf>,
    /// How it is booted
    #[command(flatten)]
    pub newcomer: NewcomerArgs,
    /// Give it the writable disks too; the kernel that sleeps can't wake up if one is written
    #[arg(long)]
    pub share_disks: bool,
    /// The file that the kernel sleeps in which is awake now; memory, if not given
    #[arg(long, value_name = "FILE")]
    pub keep_in: Option<PathBuf>,
    /// What a kernel that wakes up, or goes on from a snapshot, makes of the time since
    #[arg(long, value_enum, default_value_t = SleptChoice::Advance)]
    pub time: SleptChoice,
    /// Keep what it writes to disks beside them, until `vmm accept`: if it ends, or another is switched to, nothing was written
    #[arg(long)]
    pub trial: bool,
}

/// Puts a running VM's kernel to sleep, and boots one that sees it as /proc/vmcore and can write it to a disk.
#[derive(Debug, Args)]
pub struct SuspendArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// The kernel to boot
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Its command line; what it needs to know is added
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Its RAM
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "128M", allow_hyphen_values = true)]
    pub memory: u64,
    /// Its vCPUs
    #[arg(long, value_name = "N", value_parser = parse_vcpus, default_value = "1", allow_hyphen_values = true)]
    pub cpus: u32,
    /// What it will be called; after its version, if not given
    #[arg(long = "as", value_name = "NAME", value_parser = parse_name)]
    pub name: Option<String>,
    /// The snapshot that it is to write, to a disk with the serial number `image`
    #[arg(long, value_name = "FILE")]
    pub write_to: Option<PathBuf>,
    /// What it is to do when it has written it
    #[arg(long, value_enum, default_value_t = AfterImage::Poweroff, requires = "write_to")]
    pub then: AfterImage,
}

/// Boots a kernel beside the one that runs, so that nobody waits for its boot when it is switched to.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// What to boot
    #[command(flatten)]
    pub boot: BootArgs,
    /// Give it the writable disks too, once it is switched to; until then nothing is on them
    #[arg(long)]
    pub share_disks: bool,
}

/// A kernel to be booted beside another.
#[derive(Debug, Args)]
pub struct BootArgs {
    /// The kernel to boot
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// How it is booted
    #[command(flatten)]
    pub newcomer: NewcomerArgs,
}

/// What goes with a kernel that is booted in a VM that has one.
#[derive(Debug, Args)]
pub struct NewcomerArgs {
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Its RAM; as much as the kernel has that is awake, if not given
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, requires = "kernel", allow_hyphen_values = true)]
    pub memory: Option<u64>,
    /// Its vCPUs; as many as the kernel has that is awake, if not given
    #[arg(long, value_name = "N", value_parser = parse_vcpus, requires = "kernel", allow_hyphen_values = true)]
    pub cpus: Option<u32>,
    /// What it will be called; after its version, if not given
    #[arg(long = "as", value_name = "NAME", value_parser = parse_name)]
    pub name: Option<String>,
}

/// Puts another kernel under the processes of a guest, which go on where they were; or all stays as it was.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// What to boot
    #[command(flatten)]
    pub boot: BootArgs,
    /// A snapshot of this kernel, booted and ready: it is taken if it is there, and else made, so that the next upgrade needs no boot
    #[arg(long, value_name = "FILE")]
    pub ready: Option<PathBuf>,
    /// Write down what changes so many times before the processes stop, so that they stop for less time
    #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(u32).range(..=100))]
    pub pre_dump: u32,
    /// Say what stands in the way, and stop nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How long the kernel may take to boot, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = clap::value_parser!(u64).range(1..))]
    pub boot_limit: u64,
    /// How long each other phase may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: u64,
}

/// What an image kernel's init does when it has written the image.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AfterImage {
    /// End the VM, of which the snapshot is left
    Poweroff,
    /// Give the machine back to the kernel that sleeps
    Return,
    /// Have the restore stub restart the machine from the snapshot
    Stub,
}

impl AfterImage {
    /// For the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Poweroff => "poweroff",
            Self::Return => "return",
            Self::Stub => "stub",
        }
    }
}

/// What a kernel that wakes up makes of the time it slept.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SleptChoice {
    /// It has passed
    Advance,
    /// It has not
    Freeze,
}

impl From<SleptChoice> for SleptTime {
    fn from(choice: SleptChoice) -> Self {
        match choice {
            SleptChoice::Advance => Self::Advance,
            SleptChoice::Freeze => Self::Freeze,
        }
    }
}

/// Drops a kernel that sleeps, or that runs beside.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// The kernel
    pub name: String,
}

/// Ends a VM's kernel at once; its memory is lost. One that sleeps goes on instead; if none does the VM ends.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// End the VM with all its kernels, those that sleep too
    #[arg(long)]
    pub all: bool,
}
