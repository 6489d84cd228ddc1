//! Stories of what `vmm` refuses: one line, the right status, soon, and nothing left behind.

use crate::vm::{ends_within, program};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a refusal may take, on a busy machine with an emulated processor: for some of them all of a snapshot is read.
const SOON: Duration = Duration::from_secs(30);

/// `vmm` with these arguments.
pub fn vmm_with<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program());
    command.args(args);
    command
}

/// `vmm` with these arguments in a mount namespace of its own, after `setup`, a shell script. It needs root.
pub fn vmm_after<'a>(setup: &str, args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-ec", &format!("{setup}\nexec \"$@\"")])
        .arg("vmm")
        .arg(program())
        .args(args);
    command
}

/// Runs a command that must be refused with `status`, in one line with each of `words`. Returns the line.
///
/// # Errors
/// It is not refused, or otherwise.
pub fn refused(mut command: Command, status: i32, words: &[&str]) -> Result<String> {
    let said = format!("{command:?}");
    let started = Instant::now();
    let output = finish(&mut command).with_context(|| said.clone())?;
    let line = one_line(&output, status, words).with_context(|| said)?;
    eprintln!("after {} ms: {line}", started.elapsed().as_millis());
    Ok(line)
}

/// As [`refused`], and the directory holds afterwards what it held before.
///
/// # Errors
/// As [`refused`], or a file came or went.
pub fn refused_in(dir: &Path, command: Command, status: i32, words: &[&str]) -> Result<String> {
    let before = names(dir)?;
    let line = refused(command, status, words)?;
    let after = names(dir)?;
    ensure!(before == after, "{line}: the directory held {before:?} and holds {after:?}");
    Ok(line)
}

/// The names in a directory.
///
/// # Errors
/// It can't be read.
pub fn names(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn one_line(output: &Output, status: i32, words: &[&str]) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(status), "{}, expected {status}; it said: {said}", output.status);
    ensure!(said.ends_with('\n') && said.lines().count() == 1, "not one line: {said}");
    ensure!(output.stdout.is_empty(), "it printed: {}", String::from_utf8_lossy(&output.stdout));
    ensure!(!said.contains("panicked"), "{said}");
    for word in words {
        ensure!(said.contains(word), "no \"{word}\" in: {said}");
    }
    Ok(said.trim_end().to_owned())
}

/// Output of a command that ends soon. It is short, so the pipes hold it until then.
fn finish(command: &mut Command) -> Result<Output> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start it")?;
    if ends_within(&mut child, SOON)? { Ok(child.wait_with_output()?) } else { still_there(child) }
}

fn still_there(mut child: Child) -> Result<Output> {
    child.kill()?;
    let output = child.wait_with_output()?;
    anyhow::bail!("not refused within {SOON:?}; it said: {}", String::from_utf8_lossy(&output.stderr))
}
