//! Stories of kernels that are put under processes that live: `vmm upgrade`, with the workload that holds on to all that could be lost.
//!
//! In: kernels, a directory. Out: what each upgrade took, or what was lost. Holds: the workload's peer, which is outside the guest, hears
//! every beat once, whatever becomes of the upgrade.

use super::carrying::{Scene, guest};
use super::disks::run;
use crate::guests::Guest;
use crate::vm::{LIMIT, program};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The most that an upgrade's downtime may be of a reboot's.
const MOST: f64 = 0.25;
/// A CRIU that says in the end that it could not dump the workload; a rehearsal it lets pass.
const FAILING: &str = r#"#!/bin/sh
/usr/sbin/criu "$@" || exit 1
case "$*" in dump*/persist/*) exit 1; esac"#;
/// Runs in the new kernel, beside whoever restores: what is done once it has the disk.
const ONCE_MOUNTED: &str = "(while ! [ -e /persist/beats ]; do sleep 0.01; done; ";

impl Scene {
    fn upgrade(&self, to: &Guest, options: &[&str]) -> Result<serde_json::Value> {
        let args = to.switch_args();
        let args = args.iter().map(String::as_str).chain(options.iter().copied());
        self.vm.ask("upgrade", &args.collect::<Vec<_>>())
    }

    /// An upgrade, after which the workload goes on on that kernel. Returns what is told of it.
    fn upgraded(&mut self, to: &str, options: &[&str]) -> Result<serde_json::Value> {
        let told = self.upgrade(&guest(to), options)?;
        let release = self.exec(&["uname", "-r"])?;
        ensure!(release.starts_with(&format!("{to}.")), "uname -r says {release}");
        self.peer.hears(to)?;
        let downtime_ms = told["downtime_ms"].as_f64().context("no downtime")?;
        println!(
            "  {} -> {}: downtime {downtime_ms:.0} ms, no beat for {} ms",
            told["from"],
            told["to"],
            self.peer.silence.as_millis()
        );
        for phase in told["phases"].as_array().into_iter().flatten() {
            let text = |key: &str| phase[key].as_str().unwrap_or_default();
            let ms = phase["ms"].as_f64().unwrap_or_default();
            println!("    {:<8} {ms:>6.0} ms  {}", text("name"), text("told"));
        }
        Ok(told)
    }

    /// An upgrade that fails names why in one line, and the workload goes on where it was.
    fn fails(&mut self, on: &str, to: &Guest, options: &[&str], why: &str) -> Result<()> {
        let said = self.upgrade(to, options).err().context("it does not fail")?.to_string();
        let line = said.trim().trim_start_matches("upgrade: ");
        ensure!(
            line.lines().count() == 1 && line.contains(why) && line.contains("goes on"),
            "expected {why}: {said}"
        );
        println!("  {line}");
        self.is_alone().and_then(|()| self.peer.hears(on)).with_context(|| format!("after \"{line}\""))
    }

    /// Ends the VM, with its network.
    fn stop(mut self) -> Result<()> {
        self.vm.ask("stop", &["--all"])?;
        self.vm.wait().map(drop)
    }

    /// No other kernel is left.
    fn is_alone(&self) -> Result<()> {
        let kernels = self.vm.ask("kernels", &[])?;
        ensure!(kernels["kernels"].as_array().is_some_and(|all| all.len() == 1), "{kernels}");
        Ok(())
    }
}

/// The workload goes on from kernel to kernel.
///
/// # Errors
/// Something is lost, or an upgrade fails.
pub fn upgraded(versions: &[&str], dir: &Path) -> Result<()> {
    let mut scene = Scene::new(versions[0], dir)?;
    for (number, to) in versions[1..].iter().enumerate() {
        scene.upgraded(to, &["--pre-dump", "1"]).with_context(|| format!("upgrade {}", number + 1))?;
    }
    scene.holds()?;
    check_disk(scene, dir)
}

/// An upgrade, beside a reboot into the same kernel with the same workload on the same disk: how long its peer does not hear of it.
///
/// # Errors
/// With the upgrade it is more than a quarter of what it is with the reboot.
pub fn upgrade_or_reboot(from: &str, to: &str, dir: &Path) -> Result<()> {
    let mut scene = Scene::new(from, dir)?;
    scene.upgraded(to, &[])?;
    let upgrade = scene.peer.silence;
    scene.holds()?;
    let reboot = scene.reboot(to, dir)?;
    scene.peer.hears(to)?;
    let ratio = upgrade.as_secs_f64() / reboot.as_secs_f64();
    println!(
        "  {from} -> {to}: no beat for {} ms with an upgrade, {} ms with a reboot, ratio {ratio:.2}",
        upgrade.as_millis(),
        reboot.as_millis()
    );
    ensure!(ratio <= MOST, "the downtime is {ratio:.2} of a reboot's");
    Ok(())
}

/// Upgrades of each kind: by a kernel that is kept ready in a file, with memory written down beforehand, by that file again. And none,
/// when a file is renamed behind the workload's back: it is named.
///
/// # Errors
/// Something is lost, or an upgrade fails, or does not.
pub fn upgraded_and_not(versions: [&str; 3], dir: &Path) -> Result<()> {
    let [first, second, third] = versions;
    let file = dir.join("ready").display().to_string();
    let ready = ["--ready", &file];
    let mut scene = Scene::new(first, dir)?;
    scene.upgraded(second, &ready)?;
    scene.upgraded(third, &["--pre-dump", "1"])?;
    let told = scene.upgrade(&guest(second), &[&ready[..], &["--dry-run"]].concat())?;
    let told = told["told"].as_str().context("nothing is told")?;
    println!("  {told}");
    ensure!(told.starts_with("nothing stands in the way of "), "{told}");
    let told = scene.upgraded(second, &ready)?;
    let phases = told["phases"].as_array().context("no phases")?;
    ensure!(phases.iter().all(|phase| phase["name"] != "boot"), "the file is not taken: {told}");
    scene.fails(second, &renaming(first), &[], "beats")?;
    scene.holds()?;
    check_disk(scene, dir)
}

/// This kernel, in which a file of the workload's is renamed as soon as it has the disk.
fn renaming(version: &str) -> Guest {
    before(version, "mv /persist/beats /persist/renamed")
}

fn before(version: &str, what: &str) -> Guest {
    guest(version).cmdline(&format!("before=\"{ONCE_MOUNTED}{what}) &\""))
}

/// Whatever fails, at each phase: the workload goes on where it was, and nothing is lost.
///
/// # Errors
/// It doesn't, or nothing says what failed.
pub fn not_upgraded(from: &str, to: &str, dir: &Path) -> Result<()> {
    let mut scene = Scene::new(from, dir)?;
    scene.fails(from, &guest(to).cmdline("rdinit=/nothing init=/nothing"), &[], "boot: ")?;
    scene.fails(from, &guest(to), &["--boot-limit", "1"], "does not answer within 1 s")?;
    scene.fails(from, &Guest::linux(to, ""), &[], "check: ")?;
    scene.fails(from, &Guest::linux(to, ""), &["--dry-run"], "check: ")?;
    // It is found before the one that the system has.
    scene.exec(&["sh", "-c", &format!("echo '{FAILING}' > /run/bin/criu; chmod +x /run/bin/criu")])?;
    scene.fails(from, &guest(to), &[], "dump: ")?;
    scene.exec(&["rm", "/run/bin/criu"])?;
    scene.fails(from, &renaming(to), &[], "beats")?;
    scene.fails(from, &before(to, "echo c > /proc/sysrq-trigger"), &[], "")?;
    scene.fails(from, &before(to, "kill -9 $(pidof vmm-agent)"), &["--limit", "20"], "")?;
    abandoned(&mut scene, from, to)?;
    scene.upgraded(to, &[]).context("after all that")?;
    scene.holds()?;
    check_disk(scene, dir)
}

/// Whoever upgrades is killed in the middle; two commands lead back.
fn abandoned(scene: &mut Scene, from: &str, to: &str) -> Result<()> {
    let mut upgrade = start_upgrade(scene, to)?;
    let deadline = Instant::now() + LIMIT;
    while scene.vm.ask("kernels", &[])?["kernels"][0]["on_trial"] != true {
        ensure!(Instant::now() < deadline, "nobody is ever on trial");
        std::thread::sleep(Duration::from_millis(10));
    }
    upgrade.kill()?;
    upgrade.wait()?;
    scene.vm.ask("switch", &["--to", &guest(from).word()])?;
    scene.checkpoint(&["resume"])?;
    scene.is_alone()?;
    scene.peer.hears(from).context("after an upgrade that nobody finished")
}

fn start_upgrade(scene: &Scene, to: &str) -> Result<Child> {
    let mut command = Command::new(program());
    command.args(["upgrade", "--api"]).arg(scene.vm.socket()).args(guest(to).switch_args());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("cannot run vmm upgrade")
}

/// The file system is whole, as after a power cut.
fn check_disk(scene: Scene, dir: &Path) -> Result<()> {
    scene.stop()?;
    let (image, mount) = (dir.join("persist"), dir.join("mount"));
    std::fs::create_dir(&mount)?;
    run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&image, &mount]))?;
    run(Command::new("umount").arg(&mount))?;
    run(Command::new("/tools/bin/e2fsck").args(["-f", "-n"]).arg(&image)).map(drop)
}
