//! One tree of processes: who belongs to it, and what ties it to those that don't.
//!
//! In: a process number. Out: all numbers of the tree, or the first tie, in one line. Holds: CRIU would find some of these itself
//! and say it less well; a pipe to somebody outside it would cut without a word.

use crate::check;
use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The process and all below it, the first one first, with the numbers of their threads after them all.
fn numbers(pid: i32) -> Result<Vec<i32>> {
    ensure!(Path::new("/proc").join(pid.to_string()).is_dir(), "there is no process {pid}");
    let mut processes = vec![pid];
    let mut threads = Vec::new();
    let mut next = 0;
    while let Some(&parent) = processes.get(next) {
        next += 1;
        // Those that end meanwhile are none of it.
        for thread in entries(&format!("/proc/{parent}/task")) {
            let children = fs::read_to_string(format!("/proc/{parent}/task/{thread}/children"));
            let children = children.unwrap_or_default();
            processes.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
            threads.extend(Some(thread).filter(|&thread| thread != parent));
        }
    }
    processes.extend(threads);
    Ok(processes)
}

/// Sends all of a tree a signal.
pub(crate) fn signal(pid: i32, signal: Signal) -> Result<()> {
    for number in numbers(pid)? {
        let pid = Pid::from_raw(number).context("a process number is not 0")?;
        // Some may have ended, with the first of them for example. A thread's number stands for its process.
        match rustix::process::kill_process(pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot send process {number} a signal"));
            }
        }
    }
    Ok(())
}

/// Whether the tree stands by itself.
pub(crate) fn is_whole(first: i32) -> Result<()> {
    let all: BTreeSet<i32> = numbers(first)?.into_iter().collect();
    ensure!(
        !all.contains(&std::process::id().cast_signed()),
        "process {first} is what this very program runs under"
    );
    let stat = fs::read_to_string(format!("/proc/{first}/stat"));
    let stat =
        stat.ok().as_deref().and_then(Stat::parse).with_context(|| format!("there is no process {first}"))?;
    ensure!(stat.state != 'Z', "process {first} has ended, and its parent has not asked how");
    // Kernel threads have none.
    ensure!(fs::read_link(format!("/proc/{first}/exe")).is_ok(), "process {first} is one of the kernel's");
    ensure!(stat.session == first, "process {first} leads no session of its own: start it with setsid");
    same_pipes(&all)
}

/// What CRIU may have meant when it did not name a file: one that belongs to its kernel.
pub(crate) fn strange_file(pid: i32) -> Option<String> {
    numbers(pid).ok()?.into_iter().find_map(|pid| check::open_files(pid).into_iter().next())
}

/// A pipe with an end on the other side would be cut.
fn same_pipes(tree: &BTreeSet<i32>) -> Result<()> {
    let mut ours = BTreeMap::new();
    for &pid in tree {
        ours.extend(pipes(pid).into_iter().map(|pipe| (pipe, pid)));
    }
    for other in entries("/proc").into_iter().filter(|pid| !tree.contains(pid)) {
        if let Some((_, pid)) = pipes(other).iter().find_map(|pipe| ours.get_key_value(pipe)) {
            let other = named(other);
            bail!("process {pid} has a pipe to process {other}, which is not carried");
        }
    }
    Ok(())
}

/// Names like `pipe:[4711]` of what a process has open.
fn pipes(pid: i32) -> BTreeSet<String> {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return BTreeSet::new() };
    let links = open.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    let names = links.filter_map(|link| link.into_os_string().into_string().ok());
    names.filter(|name| name.starts_with("pipe:")).collect()
}

/// `312 (sh)`, with the backquotes that names get.
fn named(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("{pid} (`{}`)", name.trim_end()),
        Err(_) => format!("{pid}, which has ended"),
    }
}

/// The numbers among a directory's names.
fn entries(dir: &str) -> Vec<i32> {
    let names = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok());
    names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Of proc(5), `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    session: i32,
}

impl Stat {
    /// The name, which may have anything in it, stands in the outermost brackets.
    fn parse(text: &str) -> Option<Stat> {
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Stat { state, session: fields.nth(2)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_hides_nothing() {
        let stat = Stat::parse("312 (a) Z (b) S 1 310 309 0 -1 4194560 1\n");
        assert_eq!(stat, Some(Stat { state: 'S', session: 309 }));
        assert_eq!(Stat::parse("312 (a"), None);
    }

    #[test]
    fn a_child_and_the_threads_belong_to_a_tree_and_this_program_is_not_carried_by_itself() {
        let me = std::process::id().cast_signed();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let all = numbers(me).unwrap();
        let said = is_whole(me).unwrap_err().to_string();
        let (there, pid) = (all.contains(&child.id().cast_signed()), child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(all[0] == me && there, "{pid} is not in {all:?}");
        assert!(said.contains("this very program"), "{said}");
    }

    #[test]
    fn a_pipe_to_somebody_outside_is_a_tie() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdout(writer).spawn().unwrap();
        let tied = same_pipes(&BTreeSet::from([child.id().cast_signed()]));
        child.kill().unwrap();
        child.wait().unwrap();
        let said = tied.unwrap_err().to_string();
        assert!(said.contains("has a pipe to process"), "{said}");
    }
}
