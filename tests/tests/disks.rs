//! Disks and snapshots belong together, end to end, with a guest of ours that has disks and no driver for them; what a guest
//! writes is told by the stories in the lab.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};
use vmm_tests::guests::Guest;
use vmm_tests::oracle;
use vmm_tests::stories::{names, refused, refused_in, vmm_with};
use vmm_tests::vm::{TestVm, vmm};

const SIZE: u64 = 2 << 20;

/// A directory with a disk, and a snapshot of a stopped machine that had it.
struct Scene {
    dir: TempDir,
    guest: Guest,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempdir()?;
        let file = File::create(dir.path().join("disk"))?;
        file.set_len(SIZE)?;
        file.write_all_at(b"old", 1 << 20)?;
        let guest = Guest::bare("counter", dir.path())?.memory("4M");
        Ok(Self { dir, guest })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn args(&self, disks: &[&str]) -> Vec<String> {
        let guest = disks.iter().fold(self.guest.clone(), |guest, disk| guest.argument("--disk", disk));
        guest.run_args()
    }

    /// A machine with the disk, saved with these arguments and stopped.
    fn save(&self, arguments: &[&str]) -> Result<()> {
        let mut vm = TestVm::start(&self.args(&[&format!("path={},id=data", self.text("disk"))]))?;
        vm.wait_for(self.guest.pulse)?;
        vm.snapshot_with(&self.path("snap"), "stop", arguments)?;
        ensure!(vm.wait()? == 0);
        Ok(())
    }

    fn write(&self, name: &str) -> Result<()> {
        Ok(File::options().write(true).open(self.path(name))?.write_all_at(b"new", 1 << 20)?)
    }

    /// The one line of a refused restore.
    fn refused(&self, arguments: &[&str], words: &[&str]) -> Result<String> {
        let snapshot = self.text("snap");
        let args = [&["restore", &snapshot], arguments].concat();
        refused_in(self.dir.path(), vmm_with(args), 1, words)
    }

    fn goes_on(&self, arguments: &[&str]) -> Result<TestVm> {
        let mut vm = TestVm::restore_with(&self.path("snap"), arguments)?;
        vm.wait_for(self.guest.pulse)?;
        Ok(vm)
    }

    fn inspect(&self) -> Result<serde_json::Value> {
        let output = vmm(["inspect", "--json", &self.text("snap")])?;
        Ok(serde_json::from_slice::<serde_json::Value>(&output.stdout)?["disks"].clone())
    }
}

#[test]
fn a_changed_disk_is_refused_by_name() -> Result<()> {
    let scene = Scene::new()?;
    scene.save(&[])?;
    scene.goes_on(&[])?;
    scene.write("disk")?;
    let disk = scene.text("disk");
    scene.refused(&[], &["disk `data`", &disk, "was written since", "--allow-changed-disks"])?;
    scene.goes_on(&["--allow-changed-disks"])?;
    File::options().write(true).open(scene.path("disk"))?.set_len(SIZE * 2)?;
    scene.refused(&["--allow-changed-disks"], &["disk `data`", "4194304 bytes", "2097152"])?;
    fs::remove_file(scene.path("disk"))?;
    scene.refused(&[], &["disk `data`", &disk, "No such file"])?;
    Ok(())
}

#[test]
fn a_disk_is_known_in_another_place() -> Result<()> {
    let scene = Scene::new()?;
    scene.save(&["--digest-disks"])?;
    fs::copy(scene.path("disk"), scene.path("copy"))?;
    fs::remove_file(scene.path("disk"))?;
    scene.goes_on(&["--disk", &format!("data={}", scene.text("copy"))])?;
    scene.write("copy")?;
    scene.refused(&["--disk", &format!("data={}", scene.text("copy"))], &["was written since"])?;
    scene.refused(&["--disk", "root=x"], &["--disk root", "`data`"])?;
    ensure!(scene.inspect()?[0]["digest"].as_str().is_some_and(|digest| digest.len() == 32));
    Ok(())
}

#[test]
fn kept_disks_serve_two_machines_at_once() -> Result<()> {
    let scene = Scene::new()?;
    scene.save(&["--with-disks"])?;
    scene.write("disk")?;
    let described = scene.inspect()?;
    let kept = described[0]["kept"].as_str().context("not kept")?.to_owned();
    ensure!(described[0]["id"] == "data" && described[0]["bytes"] == SIZE);
    let one = scene.goes_on(&[])?;
    let two = scene.goes_on(&["--disk", &format!("data={}", scene.text("two"))])?;
    let before = fs::read(scene.path(&kept))?;
    ensure!(before[1 << 20..][..3] == *b"old" && fs::read(scene.path("two"))? == before);
    one.snapshot_with(&scene.path("again"), "stop", &["--with-disks"])?;
    drop((one, two));
    ensure!(names(scene.dir.path())?.iter().all(|name| !name.display().to_string().contains("tmp-")));
    Ok(())
}

/// The snapshot that takes another's place takes that one's disks away, too.
#[test]
fn kept_disks_go_with_their_snapshot() -> Result<()> {
    let scene = Scene::new()?;
    scene.save(&["--with-disks"])?;
    let first = scene.inspect()?[0]["kept"].as_str().context("not kept")?.to_owned();
    let vm = scene.goes_on(&[])?;
    let refused = vm.snapshot(&scene.path("snap"), "resume").unwrap_err().to_string();
    ensure!(refused.contains("disk `data`") && refused.contains("--with-disks"), "{refused}");
    ensure!(scene.path(&first).exists());
    vm.snapshot_with(&scene.path("snap"), "resume", &["--with-disks"])?;
    ensure!(!scene.path(&first).exists());
    let second = scene.inspect()?[0]["kept"].as_str().context("not kept")?.to_owned();
    ensure!(scene.path(&second).exists());
    let full = vm.snapshot_with(Path::new("/dev/full"), "resume", &["--with-disks"]);
    ensure!(full.is_err() && names(Path::new("/dev"))?.iter().all(|name| !name.ends_with(".disk")));
    Ok(())
}

#[test]
fn a_disk_has_one_writer() -> Result<()> {
    let scene = Scene::new()?;
    let disk = scene.text("disk");
    let mut first = TestVm::start(&scene.args(&[&disk]))?;
    first.wait_for(scene.guest.pulse)?;
    let args = |disks: &[&str]| scene.args(disks);
    let run = |args: Vec<String>, words: &[&str]| {
        refused(vmm_with(args.iter().map(String::as_str).collect::<Vec<_>>()), 1, words)
    };
    run(args(&[&disk]), &["disk `disk0`", &disk, "in use"])?;
    run(args(&[&format!("{disk},readonly=on")]), &["disk `disk0`", "in use"])?;
    drop(first);
    run(args(&[&disk, &disk]), &["disk `disk1`", "in use"])?;
    let shared = format!("{disk},readonly=on");
    let mut readers = [TestVm::start(&args(&[&shared]))?, TestVm::start(&args(&[&shared]))?];
    readers.iter_mut().try_for_each(|vm| vm.wait_for(scene.guest.pulse).map(drop))
}

#[test]
fn what_is_no_disk_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let mut image = vec![0; 65536];
    image[..4].copy_from_slice(&[0x51, 0x46, 0x49, 0xfb]);
    fs::write(scene.path("qcow2"), image)?;
    fs::write(scene.path("odd"), [0; 700])?;
    let run = |disk: &str, status, words: &[&str]| {
        let args = scene.args(&[disk]);
        refused(vmm_with(args.iter().map(String::as_str).collect::<Vec<_>>()), status, words)
    };
    for (name, words) in [
        ("missing", &["No such file"][..]),
        ("qcow2", &["qcow2", "qemu-img convert -O raw"]),
        ("odd", &["700 bytes", "multiple of 512"]),
        ("", &["neither"]),
    ] {
        run(
            &scene.text(name),
            1,
            &[&["disk `disk0`", scene.text(name).trim_end_matches('/')], words].concat(),
        )?;
    }
    run("path=x,size=3", 2, &["--disk", "size", "readonly"])?;
    run("path=x,engine=fast", 2, &["engine=fast", "uring"])?;
    run("path=x,id=a/b", 2, &["a/b"])?;
    run("id=a", 2, &["path="])?;
    Ok(())
}

/// A machine with disks, captured again before it runs, is the one that was saved.
#[test]
fn disks_pass_the_oracle() -> Result<()> {
    for engine in ["threads", "auto"] {
        let scene = Scene::new()?;
        let disk = format!("{},serial=S-1,engine={engine}", scene.text("disk"));
        let mut vm = TestVm::start(&scene.args(&[&disk]))?;
        vm.wait_for(scene.guest.pulse)?;
        vm.snapshot_and_stop(&scene.path("first"))?;
        TestVm::restore_paused(&scene.path("first"))?.snapshot_and_stop(&scene.path("second"))?;
        oracle::same_machine(&scene.path("first"), &scene.path("second"))?;
    }
    Ok(())
}
