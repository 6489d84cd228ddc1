//! One tree of processes as a stream of bytes, for another machine.
//!
//! In: its first process, or such a stream. Out: the other. Holds: the stream tells at its beginning what is in it, and the rest is a
//! tar archive of CRIU's images. The processes run on, or stand still until somebody says what becomes of them. TCP connections are
//! closed in the copy, since the other machine has another address.

use crate::about::About;
use crate::cpu::Processor;
use crate::criu::{self, Then, Tree};
use crate::tree;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where images are while they are made or read: memory.
const SCRATCH: &str = "/run";
const PREFIX: &str = "vmm-process-";

/// Writes the tree to standard output. Afterwards it stands still if `then` says so, and runs if it could not be written.
pub(crate) fn export(pid: i32, then: Then) -> Result<()> {
    tree::is_whole(pid)?;
    criu::get_ready()?;
    let scratch = Scratch::new()?;
    let tree = Tree { pid, contained: is_contained(pid)? };
    let dumped = criu::dump_tree(&tree, then, &scratch.0).map_err(|error| match tree::strange_file(pid) {
        Some(file) => error.context(file),
        None => error,
    });
    let exported = dumped.and_then(|()| write(tree, &scratch.0));
    if exported.is_err() && then == Then::Stop {
        tree::signal(pid, Signal::CONT)?;
    }
    exported
}

fn write(tree: Tree, images: &Path) -> Result<()> {
    let about = About { pids: numbers(tree.pid, images)?, tree, processor: Processor::here() };
    let mut stdout = io::stdout();
    stdout
        .write_all(about.text().as_bytes())
        .and_then(|()| stdout.flush())
        .context("cannot write the stream")?;
    tar("-c", &["."], images)
}

/// Those that were dumped, the first process first: some may have come and gone since somebody looked.
fn numbers(first: i32, images: &Path) -> Result<Vec<i32>> {
    let mut numbers = vec![first];
    for image in fs::read_dir(images)? {
        // Each process and thread has a `core-NUMBER.img`, by the number that it has in its container.
        let name = image?.file_name().into_string().unwrap_or_default();
        let number = name.strip_prefix("core-").and_then(|name| name.strip_suffix(".img"));
        numbers.extend(number.and_then(|number| number.parse().ok()).filter(|&number: &i32| number != first));
    }
    Ok(numbers)
}

/// A tree that stands still goes on.
pub(crate) fn go_on(pid: i32) -> Result<()> {
    tree::signal(pid, Signal::CONT)
}

/// It ends.
pub(crate) fn end(pid: i32) -> Result<()> {
    tree::signal(pid, Signal::KILL)
}

/// Restores the tree on standard input, and returns its first process.
pub(crate) fn import() -> Result<i32> {
    // Without a buffer, since tar reads on from here.
    let mut stream = File::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    let about = About::read(&mut stream)?;
    if let Some(why) = Processor::here().lacks(&about.processor) {
        bail!("{why}");
    }
    if !about.tree.contained {
        about.pids.iter().try_for_each(|&pid| is_free(pid))?;
    }
    criu::get_ready()?;
    let scratch = Scratch::new()?;
    tar("-x", &[], &scratch.0)?;
    criu::restore_tree(&about.tree, &scratch.0)
}

/// Outside of a container a process has the number that it had.
fn is_free(pid: i32) -> Result<()> {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => bail!("process number {pid} is taken, by `{}`", name.trim_end()),
        Err(_) => Ok(()),
    }
}

/// Whether it has other mounts than this program.
fn is_contained(pid: i32) -> Result<bool> {
    let mounts = |of: &str| {
        let link = format!("/proc/{of}/ns/mnt");
        fs::read_link(&link).with_context(|| format!("cannot read {link}"))
    };
    Ok(mounts(&pid.to_string())? != mounts("self")?)
}

/// Between an archive and a directory; the archive is at standard output or input.
fn tar(verb: &str, what: &[&str], dir: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg(verb).args(["-f", "-", "-C"]).arg(dir).args(what).stderr(Stdio::piped());
    let said = tar.spawn().and_then(std::process::Child::wait_with_output).context("cannot run tar")?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(
        said.status.success(),
        "{}",
        complaint.lines().next().unwrap_or("tar fails, and does not say why")
    );
    Ok(())
}

/// A directory in memory, which goes with the value; or with the next, if this program is killed.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new() -> Result<Scratch> {
        forget_old(Path::new(SCRATCH))?;
        let dir = Path::new(SCRATCH).join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes directories of programs that are no more.
fn forget_old(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let Some(pid) = name.strip_prefix(PREFIX) else { continue };
        if !Path::new("/proc").join(pid).is_dir() {
            // CRIU may still write there, of its own accord; then it is the next one's to remove.
            let _ = fs::remove_dir_all(dir.join(&name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_dumped_is_told_by_the_images() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["core-312.img", "core-313.img", "mm-312.img", "core-x.img", "pstree.img"] {
            File::create(dir.path().join(name)).unwrap();
        }
        assert_eq!(numbers(312, dir.path()).unwrap(), [312, 313]);
    }

    #[test]
    fn what_a_killed_program_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (own, old) = (format!("{PREFIX}{}", std::process::id()), format!("{PREFIX}4999999"));
        for name in [&own, &old, "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        forget_old(dir.path()).unwrap();
        let there = |name: &str| dir.path().join(name).exists();
        assert_eq!((there(&own), there(&old), there("other")), (true, false, true));
    }
}
