//! The story of the agent in a guest: `vmm exec` and `vmm agent`, over vsock.
//!
//! In: a Linux guest with the agent, a directory. Out: nothing, or why the story failed. Holds: the guest's side of what is
//! asked is looked at by commands in the guest.

use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm, program, vmm};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// 2040-01-01 00:00 UTC, for date(1).
const LATER: &str = "@2208988800";
/// All of 10.1.1.0/24 is the guest itself, and connects from 10.1.1.1: to the kernel a connection between two machines,
/// which has both ends here.
const CONNECT: &str = "ip addr add 10.1.1.1/24 dev lo; \
                       sleep 1000 | nc -l -p 5000 >/dev/null 2>&1 & \
                       until netstat -tnl | grep -q ':5000 '; do sleep 0.1; done; \
                       sleep 1000 | nc 10.1.1.2 5000 >/dev/null 2>&1 &";

/// Commands run, the clock, the random numbers and the connections are in the host's hand, before a restore and after.
///
/// # Errors
/// Something of that is not so.
pub fn agent(guest: &Guest, dir: &Path) -> Result<()> {
    let (vsock, file) = (dir.join("vsock"), dir.join("snapshot"));
    let device = ["--vsock".to_owned(), vsock.display().to_string()];
    let mut vm = TestVm::start(&[&guest.run_args()[..], &device].concat())?;
    vm.wait_for("ready kernel=")?;
    let boot = boot_id(&vsock)?;
    commands(&vsock)?;
    a_dialogue(&vsock)?;
    an_orphan_ends(&vsock)?;
    clock_and_seed(&vsock)?;
    connections(&vsock)?;
    vm.snapshot_and_stop(&file)?;

    let mut restored =
        TestVm::start(&[&["restore".to_owned(), file.display().to_string()], &device[..]].concat())?;
    restored.wait_for(guest.pulse)?;
    let after = boot_id(&vsock).context("after a restore")?;
    ensure!(after == boot && boot.len() == 37, "boot {boot} before, {after} after");
    commands(&vsock).context("after a restore")?;
    let by_api = Command::new(program())
        .arg("exec")
        .arg("--api")
        .arg(restored.socket())
        .args(["--", "true"])
        .status()?;
    ensure!(by_api.success(), "vmm exec --api: {by_api}");
    Ok(())
}

fn boot_id(vsock: &Path) -> Result<String> {
    let said = exec(vsock, &["cat", "/proc/sys/kernel/random/boot_id"], b"")?;
    ensure!(said.status.success(), "{said:?}");
    Ok(String::from_utf8(said.stdout)?)
}

/// Streams and statuses come back as they were.
fn commands(vsock: &Path) -> Result<()> {
    let said = exec(vsock, &["sh", "-c", "cat; echo \"$1\" >&2; exit 7", "sh", "a  b"], b"input")?;
    ensure!((&said.stdout[..], &said.stderr[..]) == (b"input", b"a  b\n"), "{said:?}");
    ensure!(said.status.code() == Some(7), "{said:?}");
    let input = vec![b'x'; 1_000_000];
    let said = exec(vsock, &["cat"], &input)?;
    ensure!(said.stdout == input, "{} bytes of a million came back", said.stdout.len());
    for (command, status) in [("kill -9 $$", 137), ("exec /nothing", 127)] {
        let said = exec(vsock, &["sh", "-c", command], b"")?;
        ensure!(said.status.code() == Some(status), "{command}: {said:?}");
    }
    let said = exec(vsock, &["/nothing"], b"")?;
    ensure!(
        said.status.code() == Some(127) && said.stderr.starts_with(b"vmm: the guest's agent: "),
        "{said:?}"
    );
    Ok(())
}

/// Each side hears the other while the command runs.
fn a_dialogue(vsock: &Path) -> Result<()> {
    let mut vmm = start(vsock, &["sh", "-c", "echo first; read -r line; echo $line"])?;
    let mut output = BufReader::new(vmm.stdout.take().context("no output")?);
    let mut said = String::new();
    output.read_line(&mut said)?;
    vmm.stdin.take().context("no input")?.write_all(b"then this\n")?;
    output.read_line(&mut said)?;
    ensure!(said == "first\nthen this\n" && vmm.wait()?.success(), "{said}");
    Ok(())
}

/// A command whose `vmm exec` is killed does not stay.
fn an_orphan_ends(vsock: &Path) -> Result<()> {
    let mut vmm = start(vsock, &["sleep", "54321"])?;
    let running = |count: &str| {
        let said = exec(vsock, &["sh", "-c", "ps | grep -c '[s]leep 54321'"], b"")?;
        Ok(said.stdout == format!("{count}\n").into_bytes())
    };
    wait_until("the command runs", || running("1"))?;
    vmm.kill()?;
    vmm.wait()?;
    wait_until("the command is gone", || running("0"))
}

/// A clock that is years ahead becomes the host's, and the kernel takes random bytes.
fn clock_and_seed(vsock: &Path) -> Result<()> {
    exec(vsock, &["date", "-s", LATER], b"")?;
    let before = epoch_seconds()?;
    ask("set-clock", vsock)?;
    let said = exec(vsock, &["date", "+%s"], b"")?;
    let now: u64 = String::from_utf8_lossy(&said.stdout).trim().parse()?;
    ensure!((before..=epoch_seconds()? + 1).contains(&now), "the guest's clock says {now}, and not {before}");
    ask("reseed", vsock).map(drop)
}

fn epoch_seconds() -> Result<u64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}

fn connections(vsock: &Path) -> Result<()> {
    ensure!(ask("list-tcp", vsock)?.is_empty(), "there are connections before there is one");
    exec(vsock, &["sh", "-c", CONNECT], b"")?;
    let two_ends = || Ok(ask("list-tcp", vsock)?.matches(" established\n").count() == 2);
    wait_until("the connection has two ends", two_ends)?;
    // The reset that the first one sends may end the second.
    let killed = ask("kill-tcp", vsock)?;
    ensure!(killed.contains(":5000 "), "{killed}");
    ensure!(ask("list-tcp", vsock)?.is_empty(), "a connection is left");
    Ok(())
}

/// `vmm agent`, which prints this.
fn ask(verb: &str, vsock: &Path) -> Result<String> {
    let said = vmm(["agent", verb, "--vsock", vsock.to_str().context("path")?])?;
    ensure!(said.status.success(), "vmm agent {verb}: {}", String::from_utf8_lossy(&said.stderr));
    Ok(String::from_utf8(said.stdout)?)
}

/// `vmm exec` to its end.
fn exec(vsock: &Path, command: &[&str], input: &[u8]) -> Result<Output> {
    let mut vmm = start(vsock, command)?;
    let mut stdin = vmm.stdin.take().context("vmm exec has no input")?;
    let input = input.to_vec();
    // A command that doesn't read is no failure.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = vmm.wait_with_output()?;
    drop(writer.join());
    Ok(output)
}

fn start(vsock: &Path, command: &[&str]) -> Result<Child> {
    let mut vmm = Command::new(program());
    vmm.arg("exec").arg("--vsock").arg(vsock).arg("--").args(command);
    vmm.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    vmm.spawn().context("cannot run vmm exec")
}

fn wait_until(what: &str, done: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !done()? {
        ensure!(Instant::now() < deadline, "never seen: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
