//! Stories of a kernel that writes another to a disk.
//!
//! In: the kernel that is frozen, the one that is shown it, a directory. Out: what the second said, or why the story failed. Holds:
//! however the second ends, the first goes on with the next number, here or where its image is restored.

use super::dumping::messages;
use super::switching::Life;
use crate::bench::Cost;
use crate::floor::Floor;
use crate::guests::Guest;
use crate::oracle;
use crate::vm::{TestVm, vmm};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// What becomes of a machine that another kernel has written to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// That kernel powers off; a new process restores the machine.
    Poweroff,
    /// It gives the machine back.
    Return,
    /// The restore stub restarts it, in the same process.
    Stub,
}

/// A kernel is frozen, another writes it to a disk from its `/proc/vmcore`, and it goes on. The digest of what the other finds in that
/// file is the one of a snapshot of the same instant, and the machine that it writes is the machine in the snapshot.
///
/// # Errors
/// It doesn't, or what was written isn't whole, or is another machine.
pub fn suspended_with(guest: &Guest, image: &Guest, after: After, dir: &Path) -> Result<()> {
    let [file, snapshot] = ["image.snapshot", "same.instant"].map(|name| dir.join(name));
    let path = file.to_str().context("path")?;
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    vm.ask("pause", &[])?;
    vm.snapshot(&snapshot, "pause")?;
    let then = match after {
        After::Poweroff => "poweroff",
        After::Return => "return",
        After::Stub => "stub",
    };
    suspend(&vm, image, &["--write-to", path, "--then", then])?;
    let ready = vm.wait_for("ready kernel=")?;
    ensure!(ready.contains(&format!("kernel={}.", image.version())), "{ready}");
    let said = vm.wait_for("image: ")?;
    let digest = format!("digest {:016x}", vmm::load::open(&snapshot)?.ram_digest());
    ensure!(said.contains(&digest), "{digest} in the snapshot; {said}");
    println!("{ready}\n{said}");
    match after {
        After::Poweroff => {
            let status = vm.wait()?;
            ensure!(status == 0, "status {status}");
            verify(&file)?;
            oracle::same_machine(&snapshot, &file)?;
            let release = format!("Linux version {}.", guest.version());
            ensure!(messages(&file)?.contains(&release), "makedumpfile finds no \"{release}\" in it");
            for arguments in [&[][..], &["--via-stub"]] {
                let mut vm = TestVm::restore_with(&file, arguments)?;
                life.clone().goes_on(&mut vm).with_context(|| format!("restored {arguments:?}"))?;
            }
        }
        After::Return => {
            vm.wait_for("goes on")?;
            life.goes_on(&mut vm)?;
        }
        After::Stub => {
            println!("{}", vm.wait_for("stub: ")?);
            life.goes_on(&mut vm)?;
            verify(&file)?;
            oracle::same_machine(&snapshot, &file)?;
        }
    }
    Ok(())
}

/// How long an image kernel takes to read `/proc/vmcore`.
///
/// # Errors
/// It can't.
pub fn vmcore_rate(guest: &Guest, image: &Guest) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    suspend(&vm, image, &[])?;
    println!("{}", vm.wait_for("rate: ")?);
    vm.ask("switch", &["--to", &guest.word()])?;
    life.goes_on(&mut vm)
}

/// So many returns from an image kernel to who sleeps, with so many bytes of RAM, and as many runs of the floor, by turns.
///
/// # Errors
/// Who sleeps doesn't go on, or the floor can't be measured.
pub fn return_cost(guest: &Guest, memory: u64, image: &Guest, count: usize) -> Result<Cost> {
    let floor = Floor::new(memory)?;
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    let mut cost = Cost::default();
    for _ in 0..count {
        suspend(&vm, image, &[])?;
        vm.wait_for(image.pulse)?;
        cost.floors.push(floor.measure()?.answered.as_secs_f64() * 1e3);
        vm.ask("stop", &[])?;
        let said = vm.wait_for("goes on after ")?;
        let ms = said.split("goes on after ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        cost.times.push(ms.context("no milliseconds")?);
        life.goes_on(&mut vm)?;
    }
    Ok(cost)
}

/// How an image kernel ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It does so by itself.
    Its,
    /// `vmm stop`.
    Stop,
    /// `vmm switch --to` the one that sleeps; the other has been told to stand still before.
    Switch,
}

/// However an image kernel ends once it has said `sign`, who sleeps goes on, in the same boot, and no half image is left.
///
/// # Errors
/// It doesn't.
pub fn outlives(guest: &Guest, ends: &[(Guest, &str, End)], dir: &Path) -> Result<()> {
    let file = dir.join("image.snapshot");
    let write = ["--write-to", file.to_str().context("path")?];
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    for (image, sign, end) in ends {
        suspend(&vm, image, &write)?;
        vm.wait_for(sign)?;
        match end {
            End::Its => {}
            End::Stop => drop(vm.ask("stop", &[])?),
            End::Switch => drop(vm.ask("switch", &["--to", &guest.word()])?),
        }
        let said = vm.wait_for(if *end == End::Switch { "ended, " } else { "goes on" })?;
        life.goes_on(&mut vm).with_context(|| format!("{sign}, {end:?}"))?;
        leaves_nothing(&vm, dir)?;
        println!("{said}");
    }
    Ok(())
}

fn verify(file: &Path) -> Result<()> {
    let output = vmm(["verify", file.to_str().context("path")?])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// `vmm suspend-with` with these arguments beside those for the guest.
fn suspend(vm: &TestVm, image: &Guest, more: &[&str]) -> Result<()> {
    let args = image.switch_args();
    let args: Vec<_> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
    vm.ask("suspend-with", &args).map(drop)
}

/// An image kernel that powers off without an image, or is stopped, or left, loses nobody and leaves no file. The first image
/// guest powers off, the second lives on.
///
/// # Errors
/// The one that sleeps doesn't go on.
pub fn without_an_image(guest: &Guest, image: [&Guest; 2], dir: &Path) -> Result<()> {
    let file = dir.join("image.snapshot");
    let write = ["--write-to", file.to_str().context("path")?];
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    for (image, args, end) in [
        (image[0], &write[..], None),
        (image[0], &[], None),
        (image[1], &write, Some("stop")),
        (image[1], &write, Some("switch")),
        (image[1], &[], Some("switch")),
    ] {
        suspend(&vm, image, args)?;
        match end {
            None => drop(vm.wait_for("goes on")?),
            Some("stop") => {
                vm.wait_for(image.pulse)?;
                vm.ask("stop", &[])?;
                vm.wait_for("goes on")?;
            }
            _ => is_left(&mut vm, guest, image, dir).with_context(|| format!("left, {args:?}"))?,
        }
        life.goes_on(&mut vm)?;
        leaves_nothing(&vm, dir)?;
    }
    Ok(())
}

/// It can't be kept, nor can what it is shown be dropped; it ends when another wakes up.
fn is_left(vm: &mut TestVm, guest: &Guest, image: &Guest, dir: &Path) -> Result<()> {
    vm.wait_for(image.pulse)?;
    let file = dir.join("kept");
    let kept = file.to_str().context("path")?;
    let back = ["--to", &guest.word()];
    let refusals = [
        vm.ask("snapshot", &[kept]),
        vm.ask("snapshot", &[kept, "--live"]),
        vm.ask("switch", &[&back[..], &["--keep-in", kept]].concat()),
        suspend(vm, guest, &[]).map(|()| serde_json::Value::Null),
    ];
    for refused in refusals {
        let error = refused.err().context("an image kernel is kept")?.to_string();
        ensure!(error.contains("is an image kernel, which can't be kept"), "{error}");
    }
    let error = vm.ask("forget", &[&guest.word()]).err().context("it is dropped")?.to_string();
    ensure!(error.contains("can't be dropped while an image kernel is shown it"), "{error}");
    vm.wait_for(image.pulse).context("after refusals")?;
    let told = vm.ask("switch", &back)?;
    ensure!(told["from_ended"] == true && told["to"] == guest.word(), "{told}");
    vm.wait_for(&format!("image kernel `{}` ended", image.word())).map(drop)
}

/// One kernel, and no file of another.
fn leaves_nothing(vm: &TestVm, dir: &Path) -> Result<()> {
    let told = vm.ask("kernels", &[])?;
    ensure!(told["kernels"].as_array().is_some_and(|kernels| kernels.len() == 1), "{told}");
    let names = std::fs::read_dir(dir)?.flatten().map(|entry| entry.file_name());
    let left: Vec<_> =
        names.filter(|name| name == "image.snapshot" || name.as_encoded_bytes()[0] == b'.').collect();
    ensure!(left.is_empty(), "files are left: {left:?}");
    Ok(())
}
