//! Archives, end to end: what is packed comes out again, and nothing else does.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use tempfile::{TempDir, tempdir};
use vmm_tests::guests::Guest;
use vmm_tests::stories::{names, refused, refused_in, vmm_with};
use vmm_tests::vm::{TestVm, program, text, vmm};

/// A directory with an archive that `vmm snapshot` wrote of a running machine.
fn archived() -> Result<(TempDir, PathBuf)> {
    let dir = tempdir()?;
    let guest = Guest::bare("counter", dir.path())?.memory("64M");
    let archive = dir.path().join("archive.zst");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    let packed = vm.ask("snapshot", &[text(&archive)?, "--compress", "zstd", "--then", "stop"])?;
    ensure!(packed["archive_bytes"] == fs::metadata(&archive)?.len(), "{packed}");
    ensure!(vm.wait()? == 0);
    ensure!(names(dir.path())?.len() == 2, "more than guest and archive: {:?}", names(dir.path())?);
    Ok((dir, archive))
}

#[test]
fn what_is_packed_goes_on_when_it_is_unpacked() -> Result<()> {
    let (dir, archive) = archived()?;
    let (snapshot, again, twin) =
        (dir.path().join("snapshot"), dir.path().join("again"), dir.path().join("twin"));
    ensure!(vmm(["unpack", text(&archive)?, text(&snapshot)?])?.status.success());
    let about = fs::metadata(&snapshot)?;
    ensure!(about.blocks() * 512 < about.len() / 8, "zeroes take room: {about:?}");
    let mut vm = TestVm::restore(&snapshot)?;
    vm.wait_for("tick ")?;
    drop(vm);

    ensure!(vmm(["pack", text(&snapshot)?, text(&again)?])?.status.success());
    ensure!(vmm(["unpack", text(&again)?, text(&twin)?])?.status.success());
    ensure!(fs::read(&snapshot)? == fs::read(&twin)?, "what comes out is not what went in");
    Ok(())
}

#[test]
fn an_archive_is_no_snapshot_and_a_snapshot_no_archive() -> Result<()> {
    let (dir, archive) = archived()?;
    for verb in ["restore", "inspect", "verify"] {
        let words = [text(&archive)?, "a Zstandard file", "vmm unpack"];
        refused_in(dir.path(), vmm_with([verb, text(&archive)?]), 1, &words)?;
    }
    let guest = dir.path().join("counter");
    let new = dir.path().join("new");
    refused_in(
        dir.path(),
        vmm_with(["unpack", text(&guest)?, text(&new)?]),
        1,
        &[text(&guest)?, "not a usable archive"],
    )?;
    refused_in(dir.path(), vmm_with(["pack", text(&guest)?, text(&new)?]), 1, &[text(&guest)?])?;
    Ok(())
}

/// The VM has ended when there turns out to be no room for an archive.
#[test]
fn a_snapshot_that_cannot_be_packed_stays() -> Result<()> {
    let dir = tempdir()?;
    let guest = Guest::bare("counter", dir.path())?.memory("4M");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    let (archive, kept) = (dir.path().join("archive"), dir.path().join("archive.unpacked"));
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 1; exec \"$@\"", "sh", text(&program())?]);
    command
        .args(["snapshot", "--compress", "zstd", "--then", "stop", "--api"])
        .arg(vm.socket())
        .arg(&archive);
    refused(command, 1, &[text(&archive)?, "too large", text(&kept)?])?;
    ensure!(vm.wait()? == 0 && !archive.exists());
    TestVm::restore(&kept)?.wait_for(guest.pulse).map(drop)
}

/// What comes out of a damaged archive is what went in, or nothing: some bytes say only how much memory the decoder may want.
#[test]
fn damaged_archives_are_refused() -> Result<()> {
    let (dir, archive) = archived()?;
    let (honest, new) = (dir.path().join("honest"), dir.path().join("new"));
    ensure!(vmm(["unpack", text(&archive)?, text(&honest)?])?.status.success());
    let honest = fs::read(honest)?;
    let unpacked = || vmm(["unpack", text(&archive)?, text(&new)?]);
    let refused =
        || refused_in(dir.path(), vmm_with(["unpack", text(&archive)?, text(&new)?]), 1, &[text(&archive)?]);
    let file = File::options().read(true).write(true).open(&archive)?;
    let length = file.metadata()?.len();
    let mut survived = 0;
    for at in (0..length).step_by(length as usize / 60) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 0x20], at)?;
        if unpacked()?.status.success() {
            ensure!(fs::read(&new)? == honest, "byte {at} of {length}: another snapshot comes out");
            fs::remove_file(&new)?;
            survived += 1;
        } else {
            refused().with_context(|| format!("byte {at} of {length}"))?;
        }
        file.write_all_at(&byte, at)?;
    }
    ensure!(survived < 20, "{survived} of 60 damaged archives were taken");
    for cut in [length / 2, 17, 8, 0] {
        file.set_len(cut)?;
        refused()?;
    }
    Ok(())
}
