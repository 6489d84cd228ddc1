//! Stories of kernels that are put under processes that live.
//!
//! Here CRIU is stood in for by a script that carries one number over: what is told is the monitor's half, with its failures.

use super::disks::{ext4, run};
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm, vmm};
use anyhow::{Context, Result, ensure};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// In place of `vmm-checkpoint`. The processes are one that beats; `/root` is the disk that both kernels share. What is to fail is in a file there.
const HAND: &str = r#"#!/bin/sh
fail() { echo "vmm-checkpoint: $1" >&2; exit 1; }
told() { [ "$(cat /root/fail 2>/dev/null)" = "$1" ]; }
beat() { while :; do [ -e /tmp/held ] || { echo $(($(cat /tmp/n) + 1)) > /tmp/n; echo "beat $(cat /tmp/n) kernel=$(uname -r) boot_id=$(cat /proc/sys/kernel/random/boot_id)" >/dev/console; }; sleep 0.1; done; }
case "$1" in
start) mount -t ext4 /dev/vda /root && echo 0 >/tmp/n && beat >/dev/null 2>&1 & ;;
check) grep -q unable /proc/cmdline && fail "CRIU says no: no kernel support"; told check && fail "open file /tmp/x is not on /persist" ;;
pre-dump) echo pages=1 ;;
dump) touch /tmp/held; sleep 0.3; told dump && { rm /tmp/held; fail "no room for the images"; }; cp /tmp/n /root/n; sync; mount -o remount,ro /root || fail busy; echo bytes=2 ;;
attach) blockdev --flushbufs /dev/vda; mount -t ext4 /dev/vda /root; told attach && fail "no address"; touch /root/mounted ;;
restore) told restore && fail "File /root/data renamed: No such file or directory"; told panic && echo c >/proc/sysrq-trigger; told hang && sleep 1000; touch /tmp/held; cp /root/n /tmp/n; beat >/dev/null 2>&1 & ;;
resume) mount -o remount,rw /root; rm -f /tmp/held /root/fail ;;
esac
exit 0
"#;

/// A disk with that script, where the test guest finds it.
fn hand(image: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let program = tree.path().join("tools/bin/vmm-checkpoint");
    fs::create_dir_all(tree.path().join("tools/bin"))?;
    fs::write(&program, HAND)?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    let mut mke2fs = Command::new("/tools/bin/mke2fs");
    run(mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(tree.path()).arg(image).arg("8M")).map(drop)
}

/// A VM with the beating process, and its disk.
struct Scene<'a> {
    dir: &'a Path,
    vm: TestVm,
    /// The last number.
    beat: u64,
}

fn guest(version: &str, more: &str) -> Guest {
    Guest::linux(version, "").cmdline("tools=vdb").cmdline(more).pulse("beat ")
}

impl<'a> Scene<'a> {
    fn new(version: &str, dir: &'a Path) -> Result<Self> {
        let path = |name: &str| dir.join(name).display().to_string();
        ext4(&dir.join("data"), "")?;
        hand(&dir.join("hand"))?;
        let guest = guest(version, "before=\"vmm-checkpoint start\"")
            .argument("--disk", &format!("{},id=data", path("data")))
            .argument("--disk", &format!("{},id=hand,readonly=on", path("hand")))
            .argument("--vsock", &path("vsock"));
        let mut scene = Self { dir, vm: TestVm::start(&guest.run_args())?, beat: 0 };
        scene.goes_on(version)?;
        Ok(scene)
    }

    /// The next numbers, on this kernel.
    fn goes_on(&mut self, version: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut seen = 0;
        while seen < 3 {
            let line = self.vm.next_line(deadline)?;
            let Some((number, rest)) =
                line.split_once("beat ").and_then(|(_, rest)| rest.split_once(" kernel="))
            else {
                continue;
            };
            // Two that are told at once may have one line, and a switch cuts any.
            let Ok(number) = number.parse::<u64>() else { continue };
            if !rest.contains("boot_id=") {
                continue;
            }
            let is_here = rest.starts_with(&format!("{version}."));
            ensure!(is_here || seen == 0, "another kernel: {line}");
            ensure!(number > self.beat, "{number} follows {}", self.beat);
            (self.beat, seen) = (number, seen + u32::from(is_here));
        }
        Ok(())
    }

    fn upgrade(&self, version: &str, more: &str, options: &[&str]) -> Result<serde_json::Value> {
        let mut args = guest(version, more).switch_args();
        args.extend(options.iter().map(|&option| option.to_owned()));
        self.vm.ask("upgrade", &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// What the guest's own shell says.
    fn guest(&self, command: &str) -> Result<()> {
        let socket = self.vm.socket().to_str().context("path")?;
        let done = vmm(["exec", "--api", socket, "--", "sh", "-c", command])?;
        ensure!(done.status.success(), "{command}: {done:?}");
        Ok(())
    }

    /// An upgrade that fails names why in one line, and the processes go on where they were.
    fn fails(&mut self, on: &str, to: &str, more: &str, options: &[&str], why: &str) -> Result<()> {
        let said = self.upgrade(to, more, options).err().context("it does not fail")?.to_string();
        let line = said.trim().trim_start_matches("upgrade: ");
        ensure!(line.lines().count() == 1 && line.contains(why) && line.contains("goes on"), "{why}: {said}");
        println!("  {line}");
        let kernels = self.vm.ask("kernels", &[])?;
        ensure!(kernels["kernels"].as_array().is_some_and(|all| all.len() == 1), "{kernels}");
        self.goes_on(on).with_context(|| format!("after \"{line}\""))
    }
}

/// A process goes on from kernel to kernel, and back to the first.
///
/// # Errors
/// It doesn't, or is on another kernel than it should be.
pub fn upgraded(versions: &[&str], dir: &Path) -> Result<()> {
    let mut scene = Scene::new(versions[0], dir)?;
    for version in &versions[1..] {
        let told = scene.upgrade(version, "", &["--pre-dump", "1"])?;
        scene.goes_on(version)?;
        let phase = |name: &str| {
            let all = told["phases"].as_array().into_iter().flatten();
            all.filter(|phase| phase["name"] == name).filter_map(|phase| phase["ms"].as_f64()).sum::<f64>()
        };
        let names = ["boot", "dump", "switch", "attach", "restore", "accept", "resume"];
        let times: Vec<_> = names.iter().map(|name| format!("{name} {:.0}", phase(name))).collect();
        println!(
            "  {} -> {}: {} ms; downtime {:.0} ms",
            told["from"],
            told["to"],
            times.join(", "),
            told["downtime_ms"].as_f64().unwrap_or(0.0)
        );
    }
    let (image, mount) = (dir.join("data"), dir.join("mount"));
    scene.vm.ask("stop", &[])?;
    scene.vm.wait()?;
    fs::create_dir(&mount)?;
    run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&image, &mount]))?;
    let kept = mount.join("mounted").exists();
    run(Command::new("umount").arg(&mount))?;
    ensure!(kept, "what the new kernel wrote is not on the disk");
    run(Command::new("/tools/bin/e2fsck").args(["-f", "-n"]).arg(&image)).map(drop)
}

/// Whatever fails, at each phase: the processes go on where they were.
///
/// # Errors
/// They don't, or nothing says what failed.
pub fn not_upgraded(from: &str, to: &str, dir: &Path) -> Result<()> {
    let mut scene = Scene::new(from, dir)?;
    let image = scene.dir.join("data");
    let fail = |scene: &Scene, phase: &str| scene.guest(&format!("echo {phase} > /root/fail; sync"));
    scene.fails(from, to, "rdinit=/nothing init=/nothing", &[], "panicked")?;
    scene.fails(from, to, "", &["--boot-limit", "1"], "does not answer within 1 s")?;
    scene.fails(from, to, "unable", &[], "CRIU says no: no kernel support")?;
    scene.fails(from, to, "unable", &["--dry-run"], "CRIU says no: no kernel support")?;
    for (phase, why) in [
        ("check", "is not on /persist"),
        ("dump", "no room for the images"),
        ("attach", "no address"),
        ("restore", "File /root/data renamed"),
        ("panic", "restore"),
        ("hang", "not done within 10 s"),
    ] {
        fail(&scene, phase)?;
        let options: &[&str] = if phase == "hang" { &["--limit", "10"] } else { &[] };
        scene.fails(from, to, "", options, why).with_context(|| phase.to_owned())?;
        scene.guest("rm -f /root/fail")?;
    }
    scene.vm.ask("stop", &[])?;
    scene.vm.wait()?;
    run(Command::new("/tools/bin/e2fsck").args(["-f", "-p"]).arg(&image)).map(drop)
}
