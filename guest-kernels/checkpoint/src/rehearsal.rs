//! A container in which next to nothing runs is dumped and restored.
//!
//! In: this kernel. Out: nothing, or why it can't be. Holds: nothing of it is left; what CRIU needs of the disk and of the kernel
//! for the workload it has needed once, and nobody waited for it.

use crate::carry::Scratch;
use crate::criu::{self, Then, Tree};
use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Command, Stdio};

pub(crate) fn rehearse() -> Result<()> {
    let images = Scratch::new()?;
    let actor = Actor(start()?);
    let tree = Tree { pid: actor.0, contained: true };
    criu::dump_tree(&tree, Then::Run, &images.0)?;
    drop(actor);
    criu::restore_tree(&tree, &images.0).map(|pid| drop(Actor(pid)))
}

/// The first process of a container, which ends with the value.
struct Actor(i32);

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = Pid::from_raw(self.0).map(|pid| kill_process(pid, Signal::KILL));
    }
}

/// By a process of its own: children of one that has made namespaces for them are in those.
fn start() -> Result<i32> {
    let mut starter = Command::new(std::env::current_exe()?);
    let said =
        starter.arg("start-empty").stdin(Stdio::null()).output().context("cannot start a container")?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "{}", complaint.trim_end());
    let pid = String::from_utf8_lossy(&said.stdout);
    pid.trim().parse().with_context(|| format!("a container was started as process `{}`", pid.trim()))
}
