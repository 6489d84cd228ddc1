//! The verbs by which a VM begins: `vmm run` and `vmm restore`.
//!
//! In: arguments. Out: checked values. Holds: what can't go together is refused before anything is opened.

use super::Cli;
use crate::clock::TimePolicy;
use crate::clones;
use crate::config::{parse_memory, parse_name, parse_vcpus};
use crate::disk::{DiskPlace, DiskWish};
use crate::kernel::ProtocolChoice;
use crate::kernel_id;
use crate::network::{NetPlace, NetWish};
use crate::panic_dump::OnPanic;
use crate::vsock::{self, VsockWish};
use clap::builder::ArgPredicate;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use std::path::PathBuf;

/// Boots a kernel in a new VM, whose console is on standard input and output.
#[derive(Debug, Args)]
pub struct Run {
    /// Kernel: a bzImage, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1", allow_hyphen_values = true)]
    pub cmdline: String,
    /// RAM, for example 256M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory, allow_hyphen_values = true)]
    pub memory: u64,
    /// Number of vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_vcpus, allow_hyphen_values = true)]
    pub cpus: u32,
    /// How an ELF kernel is entered
    #[arg(long, value_enum, default_value_t = EntryChoice::Auto)]
    pub entry: EntryChoice,
    /// Name of the VM, for status and snapshots
    #[arg(long, default_value = "vm", value_parser = parse_name)]
    pub name: String,
    /// Give the guest a disk: a path, and if need be `,id=ID,readonly=on,serial=TEXT,engine=auto|uring|threads`. Repeatable
    #[arg(long = "disk", value_name = "DISK", value_parser = DiskWish::parse)]
    pub disks: Vec<DiskWish>,
    /// Give the guest a network device (virtio-net) on a tap, named or (fd=N) open already. Repeatable
    #[arg(long = "net", value_name = "TAP[,mac=ADDRESS][,id=ID][,mtu=BYTES]", value_parser = NetWish::parse)]
    pub nets: Vec<NetWish>,
    /// Give the guest a source of random bytes (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    /// Let the guest give memory back, by itself and when asked to with `vmm balloon` (virtio-balloon)
    #[arg(long)]
    pub balloon: bool,
    /// The console on standard input and output; COM1's output is shown in any case
    #[arg(long, value_enum, default_value_t = ConsoleChoice::Serial)]
    pub console: ConsoleChoice,
    /// Give the guest sockets to the host (virtio-vsock), behind Unix sockets at PATH and PATH_PORT
    #[arg(long, value_name = "PATH[,cid=N]", value_parser = vsock::parse)]
    pub vsock: Option<VsockWish>,
    /// Start Linux even where this host's KVM cannot run it
    #[arg(long)]
    pub force: bool,
    /// Who looks after it
    #[command(flatten)]
    pub care: Care,
}

/// Goes on with a VM where a snapshot left it: its memory is read from the file as the guest comes to need it.
#[derive(Clone, Debug, Args)]
#[group(id = "listening", args = ["socket", "api_dir"], multiple = true)]
pub struct Restore {
    /// The snapshot
    pub file: PathBuf,
    /// Have a small guest program, the restore stub, check all of the snapshot and copy its RAM into place
    #[arg(long, conflicts_with = "verify")]
    pub via_stub: bool,
    /// When RAM is held against its digests; the rest always is, before anything else. With --key it is full
    #[arg(
        long,
        value_enum,
        default_value = "lazy",
        default_value_if("key", ArgPredicate::IsPresent, "full")
    )]
    pub verify: VerifyChoice,
    /// Refuse a snapshot that was not written with this key
    #[arg(long, value_name = "FILE", conflicts_with = "via_stub")]
    pub key: Option<PathBuf>,
    /// Refuse a snapshot of any other kernel: a release as of `uname -r` or its first parts, or a build id
    #[arg(long, value_name = "VERSION|BUILD-ID", value_parser = kernel_id::parse)]
    pub expect_kernel: Option<String>,
    /// Do not let the guest run until `vmm resume`
    #[arg(long, requires = "listening")]
    pub paused: bool,
    /// Put the vsock device's Unix socket here, instead of where the snapshot says
    #[arg(long, value_name = "PATH", value_parser = vsock::parse_path)]
    pub vsock: Option<PathBuf>,
    /// Where a disk is now, and if need be `,engine=…`. A kept disk is copied there if nothing is there yet. Repeatable
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = DiskPlace::parse)]
    pub disks: Vec<DiskPlace>,
    /// Take disks that were written since the snapshot as they are
    #[arg(long)]
    pub allow_changed_disks: bool,
    /// Put a network device on another tap: its name, or fd:N. Repeatable
    #[arg(long = "net", value_name = "ID=TAP[,mac=ADDRESS]", value_parser = NetPlace::parse)]
    pub nets: Vec<NetPlace>,
    /// What guest time does about the time since the snapshot
    #[arg(long, value_enum, default_value_t = TimeChoice::Advance)]
    pub time: TimeChoice,
    /// Say on standard error how long it took to the guest's first instruction, and to the last fault of its working set
    #[arg(long, value_enum, value_name = "AS", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub timing: Option<TimingChoice>,
    /// Write a list of the memory that the guest uses first, beside the snapshot, for --prefetch. That is read from the disk, page by page, and --verify lazy is left out
    #[arg(long, conflicts_with_all = ["via_stub", "prefetch", "clones"])]
    pub record_working_set: bool,
    /// Fetch what that list names ahead of the guest
    #[arg(long, conflicts_with = "via_stub")]
    pub prefetch: bool,
    /// Start so many VMs, each a process of its own; they share the memory that none of them has written. In a path, `{n}` is a VM's number
    #[arg(short = 'n', long, value_name = "N", requires = "api_dir", conflicts_with_all = ["disks", "nets", "on_panic"], value_parser = clap::value_parser!(u32).range(1..=i64::from(clones::MAX)))]
    pub clones: Option<u32>,
    /// Where the VMs listen for control, on N.api, and put what they print, in N.console
    #[arg(long, value_name = "DIR", requires = "clones", conflicts_with = "socket")]
    pub api_dir: Option<PathBuf>,
    /// Who looks after it
    #[command(flatten)]
    pub care: Care,
}

impl Restore {
    /// What a guest has been given before its RAM is known to be one's own can't be taken back.
    ///
    /// # Errors
    /// A key, and RAM that is checked later or never.
    pub fn check(&self) -> Result<(), clap::Error> {
        if self.key.is_none() || self.verify == VerifyChoice::Full {
            return Ok(());
        }
        let why = "with '--key' all RAM is checked before the guest runs: '--verify' can only be full";
        Err(Cli::command().error(ErrorKind::ArgumentConflict, why))
    }
}

/// How a VM that this process runs is looked after.
#[derive(Clone, Debug, Args)]
pub struct Care {
    /// Listen for control on this Unix socket
    #[arg(long = "api", value_name = "SOCKET", id = "socket")]
    pub socket: Option<PathBuf>,
    /// When the guest's kernel panics, write a dump. One that is there already stays: the next is FILE.1
    #[arg(long, value_name = "dump=FILE", value_parser = OnPanic::parse)]
    pub on_panic: Option<OnPanic>,
}

/// How an ELF kernel is entered.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum EntryChoice {
    /// PVH if the kernel has it, else the 64-bit Linux protocol
    Auto,
    /// The 64-bit Linux protocol
    Linux,
    /// PVH
    Pvh,
}

impl From<EntryChoice> for ProtocolChoice {
    fn from(choice: EntryChoice) -> Self {
        match choice {
            EntryChoice::Auto => Self::Auto,
            EntryChoice::Linux => Self::Linux64,
            EntryChoice::Pvh => Self::Pvh,
        }
    }
}

/// The console that typed input goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleChoice {
    /// COM1, `ttyS0` for Linux
    Serial,
    /// A virtio console, `hvc0` for Linux; COM1 until it has a driver
    Virtio,
}

/// When the RAM of a snapshot is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VerifyChoice {
    /// Never
    None,
    /// While the guest runs, at the lowest priority; a chunk that is not what was saved ends it
    Lazy,
    /// All of it before the guest's first instruction
    Full,
}

/// What guest time does about the time that a VM spent in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimeChoice {
    /// All clocks of the guest move on by it
    Advance,
    /// All clocks of the guest go on from where they were
    Freeze,
    /// As freeze, but the wall clock is set: by the guest's agent if there is one, else by the guest itself, from its RTC
    Step,
}

impl From<TimeChoice> for TimePolicy {
    fn from(choice: TimeChoice) -> Self {
        match choice {
            TimeChoice::Advance => Self::Advance,
            TimeChoice::Freeze => Self::Freeze,
            TimeChoice::Step => Self::Step,
        }
    }
}

/// How times are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimingChoice {
    /// Milliseconds, in a line of text
    Text,
    /// Nanoseconds of the host's monotonic clock, in a line of JSON
    Json,
}
