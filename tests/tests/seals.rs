//! Snapshots that are written with a key, end to end: one's own are told from others'.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Result, ensure};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};
use vmm_tests::forge;
use vmm_tests::guests::Guest;
use vmm_tests::stories::{refused, refused_in, vmm_with};
use vmm_tests::vm::{TestVm, done, text};

/// A directory with two keys, and a running machine.
struct Scene {
    dir: TempDir,
    vm: TestVm,
    guest: Guest,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempdir()?;
        let guest = Guest::bare("counter", dir.path())?.memory("4M");
        fs::write(dir.path().join("key"), [7; 32])?;
        fs::write(dir.path().join("other-key"), [8; 32])?;
        let mut vm = TestVm::start(&guest.run_args())?;
        vm.wait_for(guest.pulse)?;
        Ok(Self { dir, vm, guest })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Takes a snapshot of that name, with the key.
    fn sealed(&self, name: &str, arguments: &[&str]) -> Result<PathBuf> {
        let (key, path) = (self.path("key"), self.path(name));
        self.vm.ask("snapshot", &[&[text(&path)?, "--key", text(&key)?], arguments].concat())?;
        Ok(path)
    }

    /// Every verb that takes a key refuses the file with it, in a line with these words.
    fn is_refused(&self, file: &Path, key: &str, words: &[&str]) -> Result<()> {
        let (key, out) = (self.path(key), self.path("out"));
        for args in [&["restore"][..], &["verify"]] {
            let args = [args, &[text(file)?, "--key", text(&key)?]].concat();
            refused_in(self.dir.path(), vmm_with(args), 1, words)?;
        }
        let flatten = vmm_with(["flatten", text(file)?, text(&out)?, "--key", text(&key)?]);
        refused_in(self.dir.path(), flatten, 1, words).map(drop)
    }
}

#[test]
fn ones_own_goes_on_and_others_do_not() -> Result<()> {
    let scene = Scene::new()?;
    let (own, plain) = (scene.sealed("own", &[])?, scene.path("plain"));
    scene.vm.snapshot(&plain, "resume")?;
    let key = scene.path("key");
    ensure!(done(&["inspect", text(&own)?])?.contains("with a key"));
    for (file, sealed) in [(&own, true), (&plain, false)] {
        let described: serde_json::Value = serde_json::from_str(&done(&["inspect", "--json", text(file)?])?)?;
        ensure!(described["sealed"] == sealed, "{described}");
    }
    done(&["verify", text(&own)?, "--key", text(&key)?])?;
    done(&["verify", text(&own)?])?;
    TestVm::restore_with(&own, &["--key", text(&key)?])?.wait_for(scene.guest.pulse)?;
    TestVm::restore(&own)?.wait_for(scene.guest.pulse)?;
    scene.is_refused(&own, "other-key", &[text(&own)?, "not written with this key"])?;
    scene.is_refused(&plain, "key", &[text(&plain)?, "written without a key"])
}

/// With the right CRCs and digests: by a writer of our own format who has no key.
#[test]
fn a_forged_machine_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let (own, forged) = (scene.sealed("own", &[])?, scene.path("forged"));
    forge::state(&own, &forged, |state| state.vcpus[0].regs.rip += 2)?;
    done(&["verify", text(&forged)?])?;
    scene.is_refused(&forged, "key", &[text(&forged)?, "written without a key"])?;
    let end = fs::metadata(&own)?.len();
    File::options().write(true).open(&own)?.write_all_at(&[1], end - 1)?;
    let key = scene.path("key");
    let restore = vmm_with(["restore", text(&own)?, "--key", text(&key)?]);
    refused_in(scene.dir.path(), restore, 1, &[text(&own)?, "GPA 0x300000"]).map(drop)
}

#[test]
fn all_of_a_chain_has_to_be_ones_own() -> Result<()> {
    let scene = Scene::new()?;
    let (base, key) = (scene.sealed("base", &["--live"])?, scene.path("key"));
    let [child, flat] = ["child", "flat"].map(|name| scene.path(name));
    let mut vm = TestVm::restore_with(&base, &["--key", text(&key)?])?;
    vm.wait_for(scene.guest.pulse)?;
    let take =
        |key: &Path| vm.ask("snapshot", &["--parent", text(&base)?, text(&child)?, "--key", text(key)?]);
    let error = format!("{:#}", take(&scene.path("other-key")).unwrap_err());
    ensure!(error.contains("not written with this key") && error.contains(text(&base)?), "{error}");
    take(&key)?;
    done(&["flatten", text(&child)?, text(&flat)?, "--key", text(&key)?])?;
    for file in [&child, &flat] {
        done(&["verify", text(file)?, "--key", text(&key)?])?;
        TestVm::restore_with(file, &["--key", text(&key)?])?.wait_for(scene.guest.pulse)?;
    }
    // The same machine, id and all, by somebody else.
    forge::state(&base, &base, |_| ())?;
    scene.is_refused(&child, "key", &[text(&base)?, "written without a key"])
}

#[test]
fn an_archive_is_checked_when_it_is_unpacked() -> Result<()> {
    let scene = Scene::new()?;
    let archive = scene.sealed("archive", &["--compress", "zstd"])?;
    let new = scene.path("new");
    let unpack = |key: &str| -> Result<_> {
        let key = scene.path(key);
        Ok(vmm_with(["unpack", text(&archive)?, text(&new)?, "--key", text(&key)?]))
    };
    refused_in(scene.dir.path(), unpack("other-key")?, 1, &[text(&new)?, "not written with this key"])?;
    ensure!(unpack("key")?.status()?.success());
    Ok(())
}

#[test]
fn what_is_no_key_and_what_would_check_too_late_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let (own, short) = (scene.sealed("own", &[])?, scene.path("short"));
    let [own, key] = [own, scene.path("key")];
    fs::write(&short, "password")?;
    for (key, why) in [(&short, "32 to 4096 random bytes"), (&scene.path("none"), "No such file")] {
        refused(vmm_with(["restore", text(&own)?, "--key", text(key)?]), 1, &[text(key)?, why])?;
        let new = scene.path("new");
        let taken = scene.vm.ask("snapshot", &[text(&new)?, "--key", text(key)?]);
        let error = format!("{:#}", taken.unwrap_err());
        ensure!(error.contains(why) && error.contains(text(key)?) && !new.exists(), "{error}");
    }
    for way in [&["--verify", "lazy"][..], &["--verify", "none"], &["--via-stub"]] {
        let args = [&["restore", text(&own)?, "--key", text(&key)?], way].concat();
        refused(vmm_with(args), 2, &["--key", way[0]])?;
    }
    Ok(())
}
