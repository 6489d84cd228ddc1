//! A snapshot that somebody shortens while a guest runs from it: whoever touches what is gone, the end is told in one line.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::tempdir;
use vmm::load;
use vmm_tests::guests::Guest;
use vmm_tests::stories::{refused, vmm_with};
use vmm_tests::vm::{LIMIT, TestVm, ends_within, program, vmm};

const MIB: u64 = 1 << 20;

/// A guest that lends a device 32 bytes at 40 MiB, and never touches them itself.
fn lender(dir: &Path) -> Result<Guest> {
    Ok(Guest::bare("entropy", dir)?.memory("64M").switch("--rng").cmdline("buffer=40 look=0"))
}

fn saved(dir: &Path, guest: &Guest) -> Result<PathBuf> {
    let path = dir.join("saved");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&path)?;
    Ok(path)
}

/// Leaves the file as much RAM as this.
fn shorten(path: &Path, ram: u64) -> Result<()> {
    let start = load::open(path)?.ram()[0].offset;
    Ok(File::options().write(true).open(path)?.set_len(start + ram)?)
}

fn is_told(vm: &mut TestVm, path: &Path) -> Result<()> {
    let status = vm.wait()?;
    let text = format!("{} was shortened while a guest runs from it", path.display());
    let told = vm.seen().iter().filter(|line| line.contains(&text)).count();
    ensure!((status, told) == (1, 1), "status {status}, told {told} times:\n{}", vm.seen().join("\n"));
    Ok(())
}

/// The I/O thread's store was a SIGBUS, which ended the process without a word.
#[test]
fn a_device_touches_what_is_gone() -> Result<()> {
    let dir = tempdir()?;
    let guest = lender(dir.path())?;
    let path = saved(dir.path(), &guest)?;
    let mut vm = TestVm::restore(&path)?;
    vm.wait_for(guest.pulse)?;
    shorten(&path, 32 * MIB)?;
    is_told(&mut vm, &path)
}

#[test]
fn a_vcpu_touches_what_is_gone() -> Result<()> {
    let dir = tempdir()?;
    let guest = Guest::bare("counter", dir.path())?.memory("4M");
    let path = saved(dir.path(), &guest)?;
    let mut vm = TestVm::restore(&path)?;
    vm.wait_for(guest.pulse)?;
    shorten(&path, 0)?;
    is_told(&mut vm, &path)
}

#[test]
fn a_snapshot_of_what_is_gone_is_refused() -> Result<()> {
    let dir = tempdir()?;
    let guest = lender(dir.path())?;
    let path = saved(dir.path(), &guest)?;
    let vm = TestVm::restore_paused(&path)?;
    vm.ask("status", &[])?;
    shorten(&path, 32 * MIB)?;
    let (socket, new) = (vm.socket().to_str().context("path")?, dir.path().join("new"));
    let new = new.to_str().context("path")?;
    refused(vmm_with(["snapshot", "--api", socket, new]), 1, &["shortened"])?;
    vm.ask("status", &[]).map(drop)
}

/// Only its name is gone: the guest goes on, and what is saved of it is whole.
#[test]
fn a_snapshot_is_deleted() -> Result<()> {
    let dir = tempdir()?;
    let guest = lender(dir.path())?;
    let path = saved(dir.path(), &guest)?;
    let mut vm = TestVm::restore(&path)?;
    vm.wait_for(guest.pulse)?;
    std::fs::remove_file(&path)?;
    vm.wait_for(guest.pulse)?;
    let again = dir.path().join("again");
    vm.snapshot_and_stop(&again)?;
    ensure!(vmm(["verify", again.to_str().context("path")?])?.status.success());
    TestVm::restore(&again)?.wait_for(guest.pulse).map(drop)
}

/// As the shell that started `vmm` wants it back.
#[test]
fn the_terminal_is_given_back() -> Result<()> {
    let dir = tempdir()?;
    let path = saved(dir.path(), &lender(dir.path())?)?;
    let output = ends_on_a_terminal(&path, |_| shorten(&path, 32 * MIB))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("was shortened"), "{}: {said}", output.status);
    Ok(())
}

/// Nothing is lost: it is the end that this signal is for any process, and at once.
#[test]
fn somebody_sends_the_signal() -> Result<()> {
    let dir = tempdir()?;
    let path = saved(dir.path(), &lender(dir.path())?)?;
    let output = ends_on_a_terminal(&path, |vmm| {
        // SAFETY: sends a signal to a child of this process, which has not been waited for.
        ensure!(unsafe { libc::kill(vmm.id() as i32, libc::SIGBUS) } == 0, "cannot signal vmm");
        Ok(())
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.signal() == Some(libc::SIGBUS), "{}: {said}", output.status);
    ensure!(!said.contains("lost"), "{said}");
    Ok(())
}

/// `vmm` runs on a terminal until this is done to it, and gives the terminal back.
fn ends_on_a_terminal(path: &Path, end: impl FnOnce(&Child) -> Result<()>) -> Result<Output> {
    let (_master, terminal) = terminal()?;
    let found = mode(&terminal)?;
    let mut vmm = Command::new(program())
        .arg("restore")
        .arg(path)
        .stdin(terminal.try_clone()?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    vmm.stdout.as_mut().context("no output")?.read_exact(&mut [0]).context("the guest says nothing")?;
    ensure!(mode(&terminal)? != found, "the terminal is not the guest's");
    end(&vmm)?;
    let ended = ends_within(&mut vmm, LIMIT)?;
    vmm.kill()?;
    let output = vmm.wait_with_output()?;
    ensure!(ended, "vmm does not end: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(mode(&terminal)? == found, "the terminal is not as it was");
    Ok(output)
}

fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let (none, null, no_size) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: two places for descriptors; everything else may be null.
    let opened = unsafe { libc::openpty(&mut master, &mut slave, none, null, no_size) };
    ensure!(opened == 0, "no terminal: {}", std::io::Error::last_os_error());
    // SAFETY: new descriptors, which nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) })
}

/// The terminal's flags.
fn mode(terminal: &OwnedFd) -> Result<[libc::tcflag_t; 4]> {
    // SAFETY: a termios is plain numbers, for which zero is a value.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes one termios.
    let read = unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut mode) };
    ensure!(read == 0, "no mode: {}", std::io::Error::last_os_error());
    Ok([mode.c_iflag, mode.c_oflag, mode.c_cflag, mode.c_lflag])
}
