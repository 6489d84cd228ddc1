//! Snapshots that are forged at random, end to end: every CRC is right, and somewhere in the machine's state are other bytes than it had.
//! Whoever restores one is refused, or has a machine; the program never panics, never dies by a signal, and takes no memory that it has no use for.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, setrlimit};
use snapshot::Section;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::tempdir;
use vmm_tests::crash::Dice;
use vmm_tests::guests::Guest;
use vmm_tests::vm::{TestVm, ends_within, program, text};
use vmm_tests::{effort, forge};

/// How long a machine that is made of one may run. This one has a tick each millisecond.
const A_WHILE: Duration = Duration::from_millis(60);
/// How long it may take to answer, or to end.
const PATIENCE: Duration = Duration::from_secs(30);
const STATUS: &[u8] = b"GET /api/v1/vm.info HTTP/1.1\r\nHost: vmm\r\n\r\n";
/// The address space that the program may have, in bytes; an honest one takes less than half.
const ADDRESSES: u64 = 1 << 30;

/// Two vCPUs, and every device that needs nothing of the host.
fn machine(dir: &Path) -> Result<Guest> {
    let (disk, vsock) = (dir.join("disk"), dir.join("vsock"));
    std::fs::write(&disk, [7; 8192])?;
    let guest = Guest::bare("entropy", dir)?.memory("18M").cpus(2).cmdline("rate=1000 slot=1");
    let guest = guest.switch("--rng").switch("--balloon").argument("--console", "virtio");
    let guest = guest.argument("--disk", &format!("path={},id=data", text(&disk)?));
    Ok(guest.argument("--vsock", text(&vsock)?))
}

#[test]
fn at_random() -> Result<()> {
    let dir = tempdir()?;
    let (honest, forged) = (dir.path().join("honest"), dir.path().join("forged"));
    let guest = machine(dir.path())?;
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&honest)?;
    let (mut refused, mut ran) = (0, 0);
    for seed in 1..=effort::of(150, 5_000) as u64 {
        let mut changed = String::new();
        // Small seeds would have their first throws alike.
        let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        forge::sections(&honest, &forged, 2, |sections| changed = change(sections, &mut dice))?;
        let ended = restored(&forged).with_context(|| format!("forgery {seed}: {changed}"))?;
        *(if ended { &mut refused } else { &mut ran }) += 1;
    }
    println!("{refused} forged snapshots ended at once, {ran} went on");
    ensure!(refused > 0 && ran > 0, "{refused} ended and {ran} went on: no forgery is what it should be");
    Ok(())
}

/// Other bytes in one of the sections. Returns what was done.
fn change(sections: &mut [Section], dice: &mut Dice) -> String {
    let which = dice.below(sections.len() as u64) as usize;
    let section = &mut sections[which];
    let mut done = section.name.clone();
    for _ in 0..=dice.below(3) {
        let at = dice.below(section.bytes.len() as u64) as usize;
        let byte = [0, 1, 0x7f, 0xff, dice.below(256) as u8][dice.below(5) as usize];
        section.bytes[at] = byte;
        done += &format!(", {byte:#x} at {at}");
    }
    done
}

/// Whether it ends by itself: before there is a machine, or soon after.
fn restored(file: &Path) -> Result<bool> {
    let socket = file.with_extension("api");
    let mut command = Command::new(program());
    command.args(["restore", "--verify", "none", "--api"]).args([&socket, file]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: a system call like any other, and safe between fork and exec.
    unsafe { command.pre_exec(limit_addresses) };
    let mut vmm = command.spawn()?;
    let ended = !has_a_machine(&mut vmm, &socket)? || ends_within(&mut vmm, A_WHILE)?;
    vmm.kill()?;
    let output = vmm.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!said.contains("panicked") && !said.contains("memory allocation"), "{said}");
    ensure!(!ended || output.status.code().is_some(), "{}: {said}", output.status);
    Ok(ended)
}

/// Waits until the monitor answers, as it does when the machine is made, or the program has ended.
fn has_a_machine(vmm: &mut Child, socket: &Path) -> Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    while !ends_within(vmm, Duration::from_millis(1))? {
        ensure!(Instant::now() < deadline, "it neither answers nor ends");
        if UnixStream::connect(socket).is_ok_and(is_answered) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Who ends meanwhile hangs up.
fn is_answered(mut api: UnixStream) -> bool {
    let asked = api.set_read_timeout(Some(PATIENCE)).and_then(|()| api.write_all(STATUS));
    asked.is_ok() && matches!(api.read(&mut [0]), Ok(1))
}

fn limit_addresses() -> std::io::Result<()> {
    Ok(setrlimit(Resource::As, Rlimit { current: Some(ADDRESSES), maximum: Some(ADDRESSES) })?)
}
