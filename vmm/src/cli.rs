//! The command line.
//!
//! In: arguments. Out: a [`Command`] with checked values. Holds: wrong usage ends here, with status 2 and one line that
//! names what was wrong.

mod files;
mod guest;
mod kernels;
mod machine;

pub use files::{
    CompressChoice, DumpArgs, File, FlattenArgs, PackArgs, SnapshotArgs, ThenChoice, UnpackArgs, VerifyArgs,
};
pub use guest::{AgentVerb, BalloonArgs, CheckpointArgs, ExecArgs, GuestAddress, RestoreProcessArgs};
pub use kernels::{
    AfterImage, BootArgs, ForgetArgs, NewcomerArgs, PrepareArgs, SleptChoice, StopArgs, SuspendArgs,
    SwitchArgs, UpgradeArgs,
};
pub use machine::{Care, ConsoleChoice, EntryChoice, Restore, Run, TimeChoice, TimingChoice, VerifyChoice};

use clap::{Args, Parser, Subcommand};
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

/// A verb. What is said here stands in the list of verbs, what is said of its arguments in its own help.
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
    /// Write a process of the guest, with all below it, to a file that other guests can read, whatever their kernel
    Checkpoint(CheckpointArgs),
    /// Have the processes in such a file go on in this guest
    RestoreProcess(RestoreProcessArgs),
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

/// Speaks to a running VM, which answers in text or JSON.
#[derive(Debug, Args)]
pub struct Remote {
    /// The VM's control socket
    #[arg(long, value_name = "SOCKET")]
    pub api: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn usage(words: &str) -> String {
        let parsed = Cli::try_parse_from(["vmm"].into_iter().chain(words.split(' ')));
        parsed.map_or_else(|error| error.to_string(), |_| String::new())
    }

    #[test]
    fn every_verb_is_well_formed_and_says_what_it_does() {
        let mut command = Cli::command();
        command.build();
        for verb in command.get_subcommands() {
            let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(about.starts_with(char::is_uppercase), "{}: {about}", verb.get_name());
        }
        command.debug_assert();
    }

    #[test]
    fn who_goes_back_to_a_sleeper_boots_nothing() {
        for other in ["--initrd f", "--memory 1G", "--cpus 2", "--as n", "--share-disks", "--kernel k"] {
            let said = usage(&format!("switch --api s --to a {other}"));
            assert!(said.contains("cannot be used with"), "{other}: {said}");
        }
        assert_eq!(usage("switch --api s --kernel k --initrd f --as n --share-disks"), "");
    }
}
