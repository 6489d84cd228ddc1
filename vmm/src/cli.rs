//! The command line.
//!
//! In: arguments. Out: a [`Command`] with checked values. Holds: wrong usage ends here, with status 2 and one line that
//! names what was wrong.

mod kernels;

pub use kernels::{
    AfterImage, BootArgs, ForgetArgs, PrepareArgs, SleptChoice, SuspendArgs, SwitchArgs, UpgradeArgs,
};

use crate::api::Then;
use crate::clock::TimePolicy;
use crate::clones;
use crate::config::{parse_balloon, parse_memory, parse_name, parse_vcpus};
use crate::disk::{DiskPlace, DiskWish};
use crate::kernel::ProtocolChoice;
use crate::kernel_id;
use crate::network::{NetPlace, NetWish};
use crate::panic_dump::OnPanic;
use crate::vsock::{self, VsockWish};
use clap::builder::ArgPredicate;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// A virtual machine monitor whose machines can be stopped, kept, copied and started again.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, after_help = STATUSES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const STATUSES: &str = "\
Exit status of run and restore:
  0  the guest powered off, or was stopped     3  the guest's kernel panicked
  1  the monitor failed                        4  the guest asked for a reset
  2  wrong usage                               5  triple fault
  128+n  ended by signal n                     any: what the guest wrote to the exit port (0xf4)";

const EXEC_STATUSES: &str = "\
Standard input, output and error are the command's. Exit status:
  that of the command      125  vmm failed, or the VM can't be reached
  128+n  ended by signal n 126  the command can't be run   127  there is no such command";

/// A verb.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Boot a kernel in a new VM
    Run(Run),
    /// Go on with a VM where a snapshot left it
    Restore(Restore),
    /// Save a running VM to a file
    Snapshot(SnapshotArgs),
    /// Write a running VM's memory and registers to a file for crash, drgn or gdb
    Dump(DumpArgs),
    /// Say what a running VM is doing
    Status(Remote),
    /// Hold a running VM still
    Pause(Remote),
    /// Let a paused VM go on
    Resume(Remote),
    /// Ask a running VM to give up memory
    Balloon(BalloonArgs),
    /// Run a command in the guest, whose agent has to be running
    #[command(after_help = EXEC_STATUSES)]
    Exec(ExecArgs),
    /// Ask the guest's agent for something else
    #[command(subcommand)]
    Agent(AgentVerb),
    /// Put a running VM's kernel to sleep, and have another one run on the same devices
    Switch(SwitchArgs),
    /// Put a running VM's kernel to sleep, and boot one that sees it as /proc/vmcore and can write it to a disk
    SuspendWith(SuspendArgs),
    /// Put another kernel under the processes of a guest, which go on where they were
    Upgrade(UpgradeArgs),
    /// Boot a kernel beside the one that runs, so that nobody waits for its boot when it is switched to
    Prepare(PrepareArgs),
    /// Write to the disks what the kernel that runs has written on trial
    Accept(Remote),
    /// List a VM's kernels: the one that is awake, and those that sleep
    Kernels(Remote),
    /// Drop a kernel that sleeps
    Forget(ForgetArgs),
    /// End a VM's kernel at once; its memory is lost. One that sleeps goes on instead; if none does the VM ends
    Stop(StopArgs),
    /// Say what a snapshot is
    Inspect(File),
    /// Make one full snapshot of one that needs others
    Flatten(FlattenArgs),
    /// Read every byte of a snapshot and check it
    Verify(VerifyArgs),
    /// Compress a snapshot that is kept for long: a Zstandard file, from which nothing runs
    Pack(PackArgs),
    /// Make a snapshot of what `vmm pack` wrote
    Unpack(UnpackArgs),
    /// Say what this host's KVM can do
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `vmm run`.
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

/// `vmm restore`.
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

/// `vmm exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Where the guest is
    #[command(flatten)]
    pub guest: GuestAddress,
    /// The command and its arguments, found on the agent's PATH; no shell
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `vmm agent`.
#[derive(Debug, Subcommand)]
pub enum AgentVerb {
    /// Set the guest's wall clock to this host's
    SetClock(GuestAddress),
    /// Give the guest's kernel 32 fresh random bytes, and have it draw a new key
    Reseed(GuestAddress),
    /// List the guest's TCP connections to other machines: the guest's end, the other end, the state
    ListTcp(GuestAddress),
    /// Reset the guest's TCP connections to other machines, and list them
    KillTcp(GuestAddress),
}

/// A guest to be reached by vsock.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct GuestAddress {
    /// The VM's control socket, which tells of its vsock socket
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// The Unix socket of the VM's vsock device
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
}

/// `vmm snapshot`.
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
    /// Save the kernel of this name, which runs beside (vmm prepare), and not the one that is awake
    #[arg(long, value_name = "NAME", conflicts_with_all = ["then", "with_disks", "digest_disks", "parent", "key", "live", "compress"])]
    pub kernel: Option<String>,
    /// Seal it with this key, a file of 32 random bytes or more, by which `vmm restore --key` tells it from others'
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Let the VM run on while its RAM, as it is now, is written
    #[arg(long, conflicts_with_all = ["then", "digest_disks"])]
    pub live: bool,
    /// Write an archive, as `vmm pack` does; it takes room for both for a while. Nothing runs from it, and it shares no memory
    #[arg(long, value_enum, value_name = "HOW", conflicts_with_all = ["with_disks", "parent"])]
    pub compress: Option<CompressChoice>,
}

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompressChoice {
    /// Zstandard, in the seekable format
    Zstd,
}

/// `vmm pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The snapshot
    pub snapshot: PathBuf,
    /// The archive to write; one of that name is replaced once the new one is whole
    pub archive: PathBuf,
}

/// `vmm unpack`.
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

/// `vmm dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// The dump to write; one of that name is replaced once the new one is whole
    pub file: PathBuf,
}

/// `vmm stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// End the VM with all its kernels, those that sleep too
    #[arg(long)]
    pub all: bool,
}

/// `vmm balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// How much of its RAM the guest is to give up in all, for example 256M; 0 gives it all back
    #[arg(value_name = "SIZE", value_parser = parse_balloon, allow_hyphen_values = true)]
    pub target: u64,
}

/// A VM to be spoken to.
#[derive(Debug, Args)]
pub struct Remote {
    /// The VM's control socket
    #[arg(long, value_name = "SOCKET")]
    pub api: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmm flatten`.
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

/// `vmm verify`.
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

/// A snapshot to be looked at.
#[derive(Debug, Args)]
pub struct File {
    /// The snapshot
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
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
