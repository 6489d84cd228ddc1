//! One tree of processes as a stream of bytes, for another machine.
//!
//! In: its first process, or such a stream. Out: the other. Holds: the stream is a tar archive whose first file tells what is in
//! it; the processes run on, it is a copy that is carried. TCP connections are closed in the copy, since the other
//! machine has another address.

use crate::criu::{self, Tree};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The archive's first file, and how that begins.
const ABOUT: &str = "about";
const MAGIC: &str = "vmm-process 1";

/// Writes the tree to standard output.
pub(crate) fn export(pid: i32) -> Result<()> {
    ensure!(Path::new("/proc").join(pid.to_string()).is_dir(), "there is no process {pid}");
    criu::get_ready()?;
    let scratch = Scratch::new()?;
    let tree = Tree { pid, contained: is_contained(pid)? };
    let pids = descendants(pid)?;
    criu::dump_tree(&tree, &scratch.0)?;
    fs::write(scratch.0.join(ABOUT), about(&tree, &pids))?;
    tar(&["-c", ABOUT, "--exclude", ABOUT, "."], &scratch.0)
}

/// Restores the tree on standard input, and returns its first process.
pub(crate) fn import() -> Result<i32> {
    criu::get_ready()?;
    let scratch = Scratch::new()?;
    tar(&["-x"], &scratch.0).context("what came is no process")?;
    let about = fs::read_to_string(scratch.0.join(ABOUT)).context("what came is no process")?;
    let (tree, pids) = parse(&about).with_context(|| format!("what came is no process: {about}"))?;
    if !tree.contained {
        pids.iter().try_for_each(|&pid| is_free(pid))?;
    }
    criu::restore_tree(&tree, &scratch.0)
}

/// Outside of a container a process has the number that it had.
fn is_free(pid: i32) -> Result<()> {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => bail!("process number {pid} is taken, by `{}`", name.trim_end()),
        Err(_) => Ok(()),
    }
}

fn about(tree: &Tree, pids: &[i32]) -> String {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    format!("{MAGIC}\nkernel={release}\ncontained={}\npids={}\n", tree.contained, pids.join(","))
}

fn parse(about: &str) -> Option<(Tree, Vec<i32>)> {
    let fields = about.strip_prefix(MAGIC)?.strip_prefix('\n')?.lines();
    let fields: BTreeMap<&str, &str> = fields.filter_map(|line| line.split_once('=')).collect();
    let pids = fields.get("pids")?.split(',').map(|pid| pid.parse().ok());
    let pids: Vec<i32> = pids.collect::<Option<_>>()?;
    let contained = fields.get("contained")?.parse().ok()?;
    Some((Tree { pid: *pids.first()?, contained }, pids))
}

/// Whether it has other mounts than this program.
fn is_contained(pid: i32) -> Result<bool> {
    let mounts = |of: &str| {
        let link = format!("/proc/{of}/ns/mnt");
        fs::read_link(&link).with_context(|| format!("cannot read {link}"))
    };
    Ok(mounts(&pid.to_string())? != mounts("self")?)
}

/// The process and all below it, in the order in which they are found.
fn descendants(pid: i32) -> Result<Vec<i32>> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&parent) = all.get(next) {
        next += 1;
        let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) else { continue };
        for thread in threads {
            let children = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    Ok(all)
}

/// Between an archive and a directory; the archive is at standard output or input.
fn tar(words: &[&str], dir: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir).args(["-f", "-"]).args(words).stderr(Stdio::piped());
    let said = tar.spawn().and_then(std::process::Child::wait_with_output).context("cannot run tar")?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "tar: {}", complaint.lines().next().unwrap_or("it did not say why"));
    Ok(())
}

/// A directory in memory, which goes with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let dir = Path::new("/run").join(format!("vmm-process-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_stream_is_told_at_its_beginning() {
        let told = about(&Tree { pid: 7, contained: false }, &[7, 9, 12]);
        let (tree, pids) = parse(&told).unwrap();
        assert_eq!((tree.pid, tree.contained, &pids[..]), (7, false, &[7, 9, 12][..]));
        assert!(parse("vmm-process 2\npids=1\ncontained=true\n").is_none());
        assert!(parse("vmm-process 1\npids=\ncontained=true\n").is_none());
    }
}
