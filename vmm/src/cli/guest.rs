//! The verbs that ask something of a guest.
//!
//! In: arguments. Out: checked values. Holds: a guest is named in one way, by its VM's control socket or by its vsock device.

use super::Remote;
use crate::config::parse_balloon;
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Runs a command in the guest, whose agent has to be running.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Where the guest is
    #[command(flatten)]
    pub guest: GuestAddress,
    /// The command and its arguments, found on the agent's PATH; no shell
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Writes a process of the guest, with all below it, to a file. They run on, unless they are to end.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Where the guest is
    #[command(flatten)]
    pub guest: GuestAddress,
    /// The first process, as the guest counts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i32::MAX as i64))]
    pub pid: u32,
    /// End them when the file is there; until then they stand still
    #[arg(long)]
    pub end: bool,
    /// The file, which may be replaced
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Has the processes in a file go on in this guest, and prints the number of the first.
#[derive(Debug, Args)]
pub struct RestoreProcessArgs {
    /// Where the guest is
    #[command(flatten)]
    pub guest: GuestAddress,
    /// What `vmm checkpoint` wrote
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Asks the guest's agent for something else.
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

/// Asks a running VM to give up memory; it needs `--balloon` from the beginning.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// The VM
    #[command(flatten)]
    pub remote: Remote,
    /// How much of its RAM the guest is to give up in all, for example 256M; 0 gives it all back
    #[arg(value_name = "SIZE", value_parser = parse_balloon, allow_hyphen_values = true)]
    pub target: u64,
}
