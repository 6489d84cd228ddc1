//! Stories of processes that are taken off one kernel and put back on another, with CRIU.
//!
//! In: kernels, a directory. Out: nothing, or what was lost. Holds: the workload itself looks at all that it holds on to, at each
//! beat, and tells its peer, which is outside the guest and counts.

use super::disks::run;
use crate::bridge::{Bridge, GUEST, HOST};
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm, vmm};
use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const MAC: &str = "02:00:00:00:00:07";

/// The workload's peer: it sends back each line, and hands it on.
pub(super) struct Peer {
    /// Where it listens. Any other than the last story's, which may still be waited on.
    port: u16,
    beats: Receiver<Result<Heard>>,
    last: Heard,
    /// The longest that nothing was heard between the last beat before [`Peer::hears`] was asked last, and its end.
    pub(super) silence: Duration,
}

/// A line, and when it came.
type Heard = (Instant, String);

impl Peer {
    pub(super) fn listen() -> Result<Peer> {
        let listener = TcpListener::bind((HOST, 0))?;
        let port = listener.local_addr()?.port();
        let (sender, beats) = channel();
        std::thread::spawn(move || {
            let mut tell = |line| sender.send(Ok((Instant::now(), line))).is_ok();
            let ended = listener.accept().map_err(Into::into).and_then(|(stream, _)| echo(stream, &mut tell));
            // Whoever waits for a line hears why there are no more.
            let _ = sender.send(Err(ended.err().unwrap_or_else(|| anyhow::anyhow!("the workload hung up"))));
        });
        let last = (Instant::now(), String::new());
        Ok(Peer { port, beats, last, silence: Duration::ZERO })
    }

    /// Three more beats on this kernel, none left out before them.
    pub(super) fn hears(&mut self, kernel: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        self.silence = Duration::ZERO;
        let mut there = 0;
        while there < 3 {
            let since = self.last.0;
            let line = self.next(deadline)?.to_owned();
            self.silence = self.silence.max(self.last.0 - since);
            let here = release(&line).is_some_and(|release| release.starts_with(&format!("{kernel}.")));
            ensure!(here || there == 0, "another kernel than {kernel}: {line}");
            there += u32::from(here);
        }
        Ok(())
    }

    /// The next beat, which is the one after the last.
    pub(super) fn next(&mut self, deadline: Instant) -> Result<&str> {
        let left = deadline.saturating_duration_since(Instant::now());
        let (at, line) = self.beats.recv_timeout(left).context("no beat from the workload")??;
        let number = number(&line).with_context(|| format!("the workload says: {line}"))?;
        ensure!(number == self.count() + 1, "{line} follows beat {}", self.count());
        self.last = (at, line);
        Ok(&self.last.1)
    }

    /// When the last beat came, of a workload that has ended, in whatever way.
    fn last_at(&mut self) -> Instant {
        let heard = self.beats.try_iter().map_while(Result::ok);
        heard.filter(|(_, line)| number(line).is_some()).last().map_or(self.last.0, |(at, _)| at)
    }

    /// Beats so far.
    fn count(&self) -> u64 {
        number(&self.last.1).unwrap_or(0)
    }
}

fn echo(stream: TcpStream, tell: &mut dyn FnMut(String) -> bool) -> Result<()> {
    let mut back = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let line = line.context("the connection to the workload")?;
        writeln!(back, "{line}")?;
        if !tell(line) {
            break;
        }
    }
    Ok(())
}

/// The number in `beat 7 kernel=6.1.0-50-cloud-amd64 pid=2 …`.
fn number(line: &str) -> Option<u64> {
    line.strip_prefix("beat ")?.split(' ').next()?.parse().ok()
}

/// The kernel in it.
fn release(line: &str) -> Option<&str> {
    line.split_once(" kernel=")?.1.split(' ').next()
}

/// A guest with the workload in it, and the workload's peer.
pub(super) struct Scene {
    pub(super) vm: TestVm,
    pub(super) peer: Peer,
    _bridge: Bridge,
}

/// A guest whose root is the small Debian, in which nothing runs yet.
pub(super) fn guest(version: &str) -> Guest {
    Guest::linux(version, "").cmdline("system=vda")
}

fn boot(version: &str, dir: &Path) -> Result<TestVm> {
    let guest = guest(version)
        .argument("--disk", "path=/guests/root,id=root,readonly=on")
        .argument("--disk", &format!("path={},id=persist", dir.join("persist").display()))
        .argument("--net", &format!("tap0,mac={MAC}"))
        .argument("--vsock", &dir.join("vsock").display().to_string());
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for("ready kernel=")?;
    Ok(vm)
}

impl Scene {
    /// Boots this kernel and starts the workload.
    pub(super) fn new(version: &str, dir: &Path) -> Result<Scene> {
        run(Command::new("/tools/bin/mke2fs")
            .args(["-q", "-t", "ext4"])
            .arg(dir.join("persist"))
            .arg("128M"))?;
        let bridge = Bridge::new("br0", &["tap0"])?;
        let peer = Peer::listen()?;
        let mut scene = Scene { vm: boot(version, dir)?, peer, _bridge: bridge };
        scene.checkpoint(&["attach", "--address", &format!("{GUEST}/24")])?;
        scene.exec(&["cp", "/run/bin/workload", "/persist/"])?;
        scene.start("/persist")?;
        scene.peer.hears(version)?;
        Ok(scene)
    }

    /// Starts the workload, with its files in that directory.
    fn start(&self, dir: &str) -> Result<String> {
        let peer = format!("{HOST}:{}", self.peer.port);
        self.checkpoint(&["start", "--", "/persist/workload", dir, &peer])
    }

    /// Reboots into that kernel and starts the workload anew; from the last beat to the first.
    pub(super) fn reboot(&mut self, to: &str, dir: &Path) -> Result<Duration> {
        self.exec(&["mkdir", "/persist/anew"])?;
        // The connection ends with the guest.
        let _ = self.exec(&["sh", "-c", "sync; reboot -f"]);
        self.vm.wait()?;
        let last = self.peer.last_at();
        self.peer = Peer::listen()?;
        self.vm = boot(to, dir)?;
        self.checkpoint(&["attach"])?;
        self.start("/persist/anew")?;
        self.peer.next(Instant::now() + LIMIT)?;
        Ok(self.peer.last.0 - last)
    }

    /// Runs `vmm-checkpoint` in the guest and returns what it says.
    pub(super) fn checkpoint(&self, words: &[&str]) -> Result<String> {
        self.exec(&[&["vmm-checkpoint"], words].concat())
    }

    /// Runs a command in the guest and returns what it says.
    pub(super) fn exec(&self, command: &[&str]) -> Result<String> {
        let socket = self.vm.socket().to_str().context("path")?;
        let done = vmm([&["exec", "--api", socket, "--"], command].concat())?;
        let complaint = String::from_utf8_lossy(&done.stderr);
        if !done.status.success() {
            bail!("{}: {}", command.join(" "), complaint.trim_end());
        }
        Ok(String::from_utf8_lossy(&done.stdout).trim_end().to_owned())
    }

    /// The database is whole, and has a row for each beat.
    pub(super) fn holds(&self) -> Result<()> {
        let said =
            self.exec(&["sqlite3", "/persist/db", "pragma integrity_check; select count(*) from t;"])?;
        let (integrity, count) = said.split_once('\n').with_context(|| format!("sqlite3 says {said}"))?;
        ensure!(integrity == "ok" && count.parse::<u64>()? >= self.peer.count(), "sqlite3 says {said}");
        Ok(())
    }
}

/// The workload is carried from kernel to kernel, each booted on the same disks and network, step by step.
///
/// # Errors
/// Something of the workload is lost, or a step fails.
pub fn carried(versions: &[&str], dir: &Path) -> Result<()> {
    let mut scene = Scene::new(versions[0], dir)?;
    println!("  {}", scene.checkpoint(&["check"])?);
    scene.checkpoint(&["dump"])?;
    scene.checkpoint(&["resume"])?;
    scene.peer.hears(versions[0]).context("after a dump that was for nothing")?;
    for pair in versions.windows(2) {
        carry(&mut scene, pair[0], pair[1]).with_context(|| format!("from {} to {}", pair[0], pair[1]))?;
    }
    scene.holds()
}

fn carry(scene: &mut Scene, from: &str, to: &str) -> Result<()> {
    let before = scene.checkpoint(&["pre-dump"])?;
    let dumped = scene.checkpoint(&["dump"])?;
    let args = [guest(to).switch_args(), vec!["--share-disks".to_owned()]].concat();
    scene.vm.ask("switch", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    scene.vm.wait_for("ready kernel=")?;
    scene.vm.ask("forget", &[&guest(from).word()])?;
    scene.checkpoint(&["attach"])?;
    let restored = scene.checkpoint(&["restore"])?;
    println!("  {from} -> {to}: {before}; {dumped}; {restored}");
    scene.peer.hears(to)
}

/// A file that the workload has open is renamed behind its back: the other kernel names it, and the first goes on as if nothing had
/// been.
///
/// # Errors
/// It is restored without the file, or nothing names it, or the first kernel doesn't go on.
pub fn renamed(from: &str, to: &str, dir: &Path) -> Result<()> {
    let mut scene = Scene::new(from, dir)?;
    scene.checkpoint(&["dump"])?;
    let args = [guest(to).switch_args(), vec!["--share-disks".to_owned(), "--trial".to_owned()]].concat();
    scene.vm.ask("switch", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    scene.vm.wait_for("ready kernel=")?;
    scene.checkpoint(&["attach"])?;
    scene.exec(&["mv", "/persist/beats", "/persist/other"])?;
    let said = scene.checkpoint(&["restore", "--hold"]).err().context("it is restored")?.to_string();
    println!("  {said}");
    ensure!(said.lines().count() == 1 && said.contains("persist/beats"), "the file is not named: {said}");
    scene.vm.ask("switch", &["--to", &guest(from).word()])?;
    scene.checkpoint(&["resume"])?;
    scene.peer.hears(from)?;
    scene.holds()
}
