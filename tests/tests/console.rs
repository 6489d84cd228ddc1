//! A console whose output nobody reads. It may hold up the guest that writes it, and nobody else.

use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;
use vmm_tests::guests::Guest;
use vmm_tests::vm::{ends_within, program, vmm};

const PIPE: usize = 4096;

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
    std::thread::sleep(Duration::from_secs(1));
    let status = vmm(["status", "--api", socket.to_str().context("path")?])?;
    // SAFETY: the child has not been waited for, so its id is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let ended = ends_within(&mut child, Duration::from_secs(20))?;
    child.kill()?;
    child.wait()?;
    ensure!(status.status.success(), "status: {status:?}");
    ensure!(ended, "vmm does not hear SIGTERM");
    Ok(())
}
