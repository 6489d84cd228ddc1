//! The first process of a container.
//!
//! In: a name and a command. Out: the command's output in `/persist/NAME.log`, and there a line when it ends. Holds: orphans of
//! the container are waited for; it has nothing open that another kernel would lack.

use crate::container;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::process::Command;

/// Runs the command to its end. Whoever started the container reads standard output until the command runs.
pub(crate) fn run(name: &str, command: &[OsString]) -> Result<()> {
    let mut starter = File::from(rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)?);
    match begin(name, command) {
        Ok(child) => {
            drop(starter);
            wait_for_all(child)
        }
        Err(error) => {
            // Who started the container may be gone, and then nobody hears.
            let _ = writeln!(starter, "{error:#}");
            Ok(())
        }
    }
}

/// Starts the command and returns its number.
fn begin(name: &str, command: &[OsString]) -> Result<i32> {
    let path = container::log(name);
    let log = OpenOptions::new().create(true).append(true).open(&path);
    let log = log.with_context(|| format!("cannot open {}", path.display()))?;
    // What this process got was opened among the mounts of its starter.
    dup2_stdin(File::open("/dev/null")?)?;
    dup2_stdout(&log)?;
    dup2_stderr(&log)?;
    let (program, arguments) = command.split_first().context("no command")?;
    let child = Command::new(program).args(arguments).spawn();
    let child = child.with_context(|| format!("cannot run {}", program.to_string_lossy()))?;
    Ok(child.id().cast_signed())
}

/// Until the command ends; what it leaves behind ends with the container.
fn wait_for_all(command: i32) -> Result<()> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == command => {
                println!("vmm-checkpoint: the command ended: {status:?}");
                return Ok(());
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the container's processes"),
        }
    }
}
