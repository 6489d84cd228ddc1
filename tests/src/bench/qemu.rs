//! Snapshots beside QEMU's: its machine `microvm`, migrated to a file and back.
//!
//! In: a directory in the lab. Out: rows. Holds: the same kernel, initrd and RAM on the same `/dev/kvm`; the two take turns, and save what runs.

use super::report::Row;
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;
const MEMORY: &str = "512M";
/// Says a line as often as it can with a sleep between.
const RUN: &str = "while sleep 0.02; do echo beat; done";
const PULSE: &str = "beat";
/// What QEMU's monitor says when it is ready for a command.
const PROMPT: &str = "(qemu) ";

/// One guest under each monitor, saved while it runs and restored, again and again.
///
/// # Errors
/// QEMU is not there, or one of them does not go on.
pub(super) fn beside_qemu(dir: &Path) -> Result<Vec<Row>> {
    let guest = Guest::linux("6.12", RUN).memory(MEMORY).pulse(PULSE);
    let (ours, theirs) = (dir.join("vmm.snapshot"), dir.join("qemu.migration"));
    let (mut vm, mut qemu) = (TestVm::start(&guest.run_args())?, Qemu::start(dir, None)?);
    vm.wait_for(PULSE)?;
    qemu.vm.wait_for(PULSE)?;
    let mut saves = [Vec::new(), Vec::new()];
    let mut restores = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let summary = vm.snapshot(&ours, "resume")?;
        saves[0].push(summary["total_ms"].as_f64().with_context(|| format!("no time: {summary}"))?);
        saves[1].push(qemu.save(&theirs)?);
        // Their guests are in nobody's way meanwhile.
        vm.ask("pause", &[])?;
        restores[0].push(until_it_speaks(|| TestVm::restore(&ours))?);
        restores[1].push(until_it_speaks(|| Ok(Qemu::start(dir, Some(&theirs))?.vm))?);
        vm.ask("resume", &[])?;
        qemu.ask("cont")?;
    }
    let mib = |file: &Path| -> Result<f64> { Ok(fs::metadata(file)?.blocks() as f64 / 2048.0) };
    let row = |what: &str, unit, of: [Vec<f64>; 2]| {
        let [vmm, qemu] = of;
        Row::new(&format!("{}, {MEMORY}: {what}, beside QEMU microvm's", guest.name), unit, vmm).beside(&qemu)
    };
    Ok(vec![
        row("save", "ms", saves),
        row("restore, spawn to the guest's next line", "ms", restores),
        row("file", "MiB", [vec![mib(&ours)?], vec![mib(&theirs)?]]),
    ])
}

/// Milliseconds.
fn until_it_speaks(start: impl FnOnce() -> Result<TestVm>) -> Result<f64> {
    let began = Instant::now();
    start()?.wait_for(PULSE)?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// A QEMU, and its monitor.
struct Qemu {
    vm: TestVm,
    socket: PathBuf,
}

impl Qemu {
    /// The guest, booted, or from a file.
    fn start(dir: &Path, from: Option<&Path>) -> Result<Self> {
        let socket = dir.join(if from.is_some() { "incoming.monitor" } else { "qemu.monitor" });
        let mut qemu = Command::new("/extra/qemu/qemu");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        qemu.args(["-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on", "-accel", "kvm"]);
        qemu.args(["-cpu", "host", "-smp", "1", "-m", MEMORY]);
        qemu.args(["-kernel", "/guests/6.12/vmlinux", "-initrd", "/guests/6.12/initrd"]);
        qemu.args(["-append", &format!("console=ttyS0 panic=-1 quiet run=\"{RUN}\"")]);
        qemu.args(["-monitor", &format!("unix:{},server=on,wait=off", socket.display())]);
        qemu.args(from.iter().flat_map(|file| ["-incoming".to_owned(), format!("file:{}", file.display())]));
        Ok(Self { vm: TestVm::start_other(qemu)?, socket })
    }

    /// Milliseconds until all of it is in the file. The guest stands still afterwards.
    fn save(&self, file: &Path) -> Result<f64> {
        // By default a migration leaves a network room for others.
        self.ask("migrate_set_parameter max-bandwidth 100g")?;
        let began = Instant::now();
        self.ask(&format!("migrate file:{}", file.display()))?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        let told = self.ask("info migrate")?;
        ensure!(told.contains("completed"), "QEMU says: {told}");
        Ok(took)
    }

    /// What the monitor says to a command.
    fn ask(&self, command: &str) -> Result<String> {
        let mut monitor = UnixStream::connect(&self.socket).context("QEMU's monitor")?;
        monitor.set_read_timeout(Some(LIMIT))?;
        let _ = answer(&mut monitor)?;
        writeln!(monitor, "{command}")?;
        let said = answer(&mut monitor)?;
        // A monitor takes the next caller once it has seen that this one is gone.
        drop(monitor);
        std::thread::sleep(Duration::from_millis(50));
        Ok(said)
    }
}

fn answer(monitor: &mut UnixStream) -> Result<String> {
    let (mut said, mut bytes) = (String::new(), [0; 4096]);
    while !said.ends_with(PROMPT) {
        let count = monitor.read(&mut bytes)?;
        ensure!(count > 0, "QEMU's monitor is gone; it said: {said}");
        said.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    Ok(said)
}
