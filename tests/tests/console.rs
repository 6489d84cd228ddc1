//! A console whose output nobody reads. It may hold up the guest that writes it, and nobody else.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;
use vmm_tests::guests::Guest;
use vmm_tests::vm::{ends_within, program, until, vmm};

const PIPE: usize = 4096;

/// Whether the first vCPU, which has the process's first thread, waits for room: it writes, or polls for that. It does neither for anything else.
fn waits_for_room(process: u32) -> bool {
    let call = fs::read_to_string(format!("/proc/{process}/task/{process}/syscall")).unwrap_or_default();
    [libc::SYS_write, libc::SYS_poll].iter().any(|number| call.starts_with(&format!("{number} ")))
}

/// The vCPU that waited for room had the serial port locked, and so the monitor's, which asked the port for its room
/// after each event, answered one command and then nothing more, SIGTERM included.
#[test]
fn an_unread_console_holds_up_neither_commands_nor_the_end() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("api");
    let (_unread, mut output) = std::io::pipe()?;
    // SAFETY: the descriptor is the pipe's, and the call takes a number.
    let size = unsafe { libc::fcntl(output.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE) };
    ensure!(size == PIPE as i32, "the pipe holds {size} bytes");
    output.write_all(&[b'.'; PIPE])?;
    let mut child = Command::new(program())
        .args(Guest::bare("counter", dir.path())?.run_args())
        .arg("--api")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(output)
        .spawn()?;
    let waits = until("the vCPU that waits for room", || Ok(waits_for_room(child.id()).then_some(())));
    // The first answer was followed by the question that nobody answered.
    let asked = || vmm(["status", "--api", socket.to_str().context("path")?]);
    let answers = [asked()?, asked()?];
    // SAFETY: the child has not been waited for, so its id is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let ended = ends_within(&mut child, Duration::from_secs(20))?;
    child.kill()?;
    child.wait()?;
    waits?;
    ensure!(answers.iter().all(|answer| answer.status.success()), "status: {answers:?}");
    ensure!(ended, "vmm does not hear SIGTERM");
    Ok(())
}
