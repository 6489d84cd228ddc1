//! Damaged and forged snapshots, end to end: each is refused with one line that names the file, by every verb that reads
//! one. That no byte at all can be flipped unseen is tested in the snapshot crate; here the program is.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use snapshot::Section;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::{TempDir, tempdir};
use vmm::capture::MachineState;
use vmm::load;
use vmm_tests::effort;
use vmm_tests::forge;
use vmm_tests::guests::Guest;
use vmm_tests::stories::{refused, refused_in, vmm_with};
use vmm_tests::vm::{TestVm, program, vmm};

/// An honest snapshot in a directory of its own, of one of our guests.
struct Saved {
    dir: TempDir,
    path: PathBuf,
}

impl Saved {
    fn of(guest: impl FnOnce(&Path) -> Result<Guest>) -> Result<Self> {
        let dir = tempdir()?;
        let (guest, path) = (guest(dir.path())?, dir.path().join("saved"));
        let mut vm = TestVm::start(&guest.run_args())?;
        vm.wait_for(guest.pulse)?;
        vm.snapshot_and_stop(&path)?;
        Ok(Self { dir, path })
    }

    fn counter() -> Result<Self> {
        Self::of(|dir| Ok(Guest::bare("counter", dir)?.memory("4M")))
    }

    fn file(&self) -> Result<File> {
        Ok(OpenOptions::new().read(true).write(true).open(&self.path)?)
    }

    /// Where RAM begins in the file, and everything before has been read.
    fn ram_start(&self) -> Result<u64> {
        Ok(load::open(&self.path)?.ram()[0].offset)
    }

    /// Every verb refuses the file as it is.
    fn is_refused(&self, words: &[&str]) -> Result<()> {
        let path = self.path.to_str().context("path")?;
        let words = [&[path], words].concat();
        for verb in ["inspect", "restore"] {
            refused_in(self.dir.path(), vmm_with([verb, path]), 1, &words)?;
        }
        Ok(())
    }

    /// Every verb refuses the file with these bytes in it.
    fn is_refused_with(&self, offset: u64, bytes: &[u8], words: &[&str]) -> Result<()> {
        let (file, mut old) = (self.file()?, vec![0; bytes.len()]);
        file.read_exact_at(&mut old, offset)?;
        file.write_all_at(bytes, offset)?;
        let refused = self.is_refused(words).with_context(|| format!("{bytes:02x?} at {offset}"));
        file.write_all_at(&old, offset)?;
        refused
    }
}

#[test]
fn truncated_anywhere() -> Result<()> {
    let saved = Saved::counter()?;
    let (ram, len) = (saved.ram_start()?, fs::metadata(&saved.path)?.len());
    let mut lengths = vec![0, 1, 3, 4, 63, 64, 65, 119, 120, ram - 1, ram, ram + 1, len - 4096, len - 1];
    lengths.extend((0..ram).step_by(ram as usize / 30));
    lengths.extend((ram..len).step_by((len - ram) as usize / 10 + 1));
    lengths.sort_unstable();
    for cut in lengths.into_iter().rev() {
        saved.file()?.set_len(cut)?;
        saved.is_refused(&[]).with_context(|| format!("{cut} of {len} bytes"))?;
    }
    Ok(())
}

#[test]
fn with_a_byte_of_its_headers_or_notes_flipped() -> Result<()> {
    let saved = Saved::counter()?;
    let before_ram = saved.ram_start()? as usize;
    for offset in (0..before_ram as u64).step_by(before_ram / effort::of(100, before_ram)) {
        let mut byte = [0];
        saved.file()?.read_exact_at(&mut byte, offset)?;
        saved.is_refused_with(offset, &[byte[0] ^ 1 << (offset % 8)], &[])?;
    }
    println!("one bit of each {}. byte before RAM flipped", before_ram / effort::of(100, before_ram));
    ensure!(
        vmm(["inspect", saved.path.to_str().context("path")?])?.status.success(),
        "the test broke the file"
    );
    Ok(())
}

#[test]
fn with_a_byte_of_ram_flipped() -> Result<()> {
    let saved = Saved::counter()?;
    let path = saved.path.to_str().context("path")?;
    ensure!(vmm(["verify", path])?.status.success(), "an honest snapshot is refused");
    let flat = saved.dir.path().join("flat");
    let flat = flat.to_str().context("path")?;
    // In the guest's program, at 1 MiB, in the last byte of its RAM, and here and there.
    let (ram, end) = (saved.ram_start()?, fs::metadata(&saved.path)?.len());
    let scattered = (1..=effort::of(10, 2000) as u64).map(|n| ram + n * 6_700_417 % (end - ram));
    for offset in [ram + (1 << 20) + 100, end - 1].into_iter().chain(scattered) {
        let mut byte = [0];
        saved.file()?.read_exact_at(&mut byte, offset)?;
        saved.file()?.write_all_at(&[byte[0] ^ 1 << (offset % 8)], offset)?;
        let chunk = format!("GPA {:#x} ", (offset - ram) >> 20 << 20);
        refused_in(saved.dir.path(), vmm_with(["verify", path]), 1, &[path, &chunk])?;
        // What is written anew would have good digests.
        refused_in(saved.dir.path(), vmm_with(["flatten", path, flat]), 1, &[path, &chunk])?;
        saved.file()?.write_all_at(&byte, offset)?;
    }
    Ok(())
}

/// In the last byte of RAM, which this guest never looks at.
#[test]
fn restored_with_a_byte_of_ram_flipped() -> Result<()> {
    let saved = Saved::counter()?;
    let end = fs::metadata(&saved.path)?.len();
    saved.file()?.write_all_at(&[0x10], end - 1)?;
    let path = saved.path.to_str().context("path")?;
    let words = [path, "the RAM chunk at GPA 0x300000"];
    refused_in(saved.dir.path(), vmm_with(["restore", "--verify", "full", path]), 1, &words)?;
    for lazily in [&[][..], &["--verify", "lazy"]] {
        let mut vm = TestVm::restore_with(&saved.path, lazily)?;
        ensure!(vm.wait()? == 1, "{:?}", vm.seen());
        let told = |line: &&String| words.iter().all(|word| line.contains(word));
        ensure!(vm.seen().iter().filter(told).count() == 1, "{:?}", vm.seen());
    }
    let clones = saved.dir.path().join("clones");
    let clones = ["restore", path, "-n", "2", "--api-dir", clones.to_str().context("path")?];
    // Before that, on a busy machine, it has told what memory the clones take.
    let output = vmm(clones)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = said.lines().last().unwrap_or_default();
    let told = last.contains("the clones cannot go on") && words.iter().all(|word| last.contains(word));
    ensure!(told && output.status.code() == Some(1), "{}: {said}", output.status);
    let mut vm = TestVm::restore_with(&saved.path, &["--verify", "none"])?;
    (0..3).try_for_each(|_| vm.wait_for("tick ").map(drop))?;
    vm.ask("stop", &[])?;
    ensure!(vm.wait()? == 0, "{:?}", vm.seen());
    refused(vmm_with(["restore", "--verify", "full", "--via-stub", path]), 2, &["--verify", "--via-stub"])?;
    Ok(())
}

/// Offsets are those of the ELF-64 specification: the headers are 64 bytes, and 56 for each part.
#[test]
fn with_absurd_lengths_or_overlapping_ram() -> Result<()> {
    let saved = Saved::of(|dir| Ok(Guest::bare("counter", dir)?.memory("3100M")))?;
    let (notes, low, high, first_note) = (64, 120, 176, 232);
    let huge = u64::MAX.to_le_bytes();
    let long = (1u64 << 62).to_le_bytes();
    for count in [0u16, 2, 4, u16::MAX] {
        saved.is_refused_with(56, &count.to_le_bytes(), &[])?;
    }
    for field in [8, 32, 40] {
        saved.is_refused_with(notes + field, &huge, &[])?;
        saved.is_refused_with(low + field, &huge, &[])?;
        saved.is_refused_with(high + field, &long, &[])?;
    }
    for part in [notes, low, high] {
        saved.is_refused_with(part + 32, &[long, long].concat(), &[])?;
    }
    for length in [u32::MAX, 1 << 31, 0] {
        saved.is_refused_with(first_note, &length.to_le_bytes(), &[])?;
        saved.is_refused_with(first_note + 4, &length.to_le_bytes(), &[])?;
    }
    for address in [0u64, 0x1000, 0xbfff_f000, u64::MAX - 4095] {
        saved.is_refused_with(high + 16, &[address.to_le_bytes(), address.to_le_bytes()].concat(), &[])?;
    }
    Ok(())
}

#[test]
fn that_are_something_else() -> Result<()> {
    let dir = tempdir()?;
    let file = |name: &str| dir.path().join(name);
    fs::write(file("text"), "not a snapshot\n")?;
    fs::write(file("empty"), "")?;
    fs::create_dir(file("directory"))?;
    fs::copy(program(), file("program"))?;
    Guest::bare("counter", dir.path())?;
    ensure!(Command::new("mkfifo").arg(file("fifo")).status()?.success(), "mkfifo");
    let others = [
        ("missing", "No such file"),
        ("text", "not an ELF file"),
        ("empty", "empty"),
        ("directory", "a directory"),
        ("program", "e_type"),
        ("counter", "e_type"),
        ("fifo", "a pipe"),
    ];
    for (name, what) in others {
        let path = file(name);
        let path = path.to_str().context("path")?;
        for verb in ["inspect", "verify", "restore"] {
            refused_in(dir.path(), vmm_with([verb, path]), 1, &[path, what])?;
        }
    }
    Ok(())
}

/// States that decode, under correct CRCs, and that no machine of this host can have.
#[test]
fn of_machines_that_cannot_be() -> Result<()> {
    type Change = fn(&mut MachineState);
    let lies: [(&str, Change); 18] = [
        ("500 in its machine", |state| state.shape.vcpus = 500),
        ("0 in its machine", |state| state.shape.vcpus = 0),
        ("RAM ranges", |state| state.shape.memory *= 2),
        ("RAM ranges", |state| state.shape.memory = u64::MAX),
        ("name", |state| state.shape.name = "a\x1b[2Jb".to_owned()),
        ("version", |state| state.shape.kernel.version = Some("6\n1".to_owned())),
        ("a processor by Imaginary", |state| another_vendor(state)),
        ("KVM_SET_CPUID2", |state| {
            let entry = state.vcpus[0].cpuid[0];
            state.vcpus[0].cpuid.resize(5000, entry);
        }),
        ("XSAVE area of 1048576 bytes", |state| state.vcpus[0].xsave.resize(1 << 20, 0)),
        ("XSAVE area of 4095 bytes", |state| state.vcpus[0].xsave.truncate(4095)),
        ("XSAVE area of 0 bytes", |state| state.vcpus[0].xsave.clear()),
        ("KVM_SET_MP_STATE", |state| state.vcpus[0].mp_state.mp_state = 99),
        ("KVM_SET_SREGS2", |state| state.vcpus[0].sregs.control[0] = u64::MAX),
        ("KVM_SET_VCPU_EVENTS", |state| state.vcpus[0].events.flags = u32::MAX),
        ("MSR 0x12345678", |state| state.vcpus[0].msrs.saved.push((0x1234_5678, 7))),
        ("1 kHz", |state| state.vcpus[0].tsc_khz = Some(1)),
        ("COM1", |state| state.board.serial.in_buffer.resize(10_000, 0)),
        ("RTC", |state| state.board.rtc.cells.truncate(3)),
    ];
    let (honest, forged) = (Saved::counter()?, Saved::counter()?);
    for (what, change) in lies {
        forge::state(&honest.path, &forged.path, change)?;
        forged.restore_is_refused(what)?;
    }
    Ok(())
}

fn another_vendor(state: &mut MachineState) {
    let leaf = state.vcpus[0].cpuid.iter_mut().find(|entry| entry.function == 0);
    let leaf = leaf.expect("CPUID has leaf 0");
    [leaf.ebx, leaf.edx, leaf.ecx] = [*b"Imag", *b"inar", *b"y   "].map(u32::from_le_bytes);
}

/// Sections that are missing, left over, of another version, or nothing that decodes.
#[test]
fn with_sections_that_cannot_be() -> Result<()> {
    type Change = fn(&mut Vec<Section>);
    let lies: [(&str, usize, Change); 6] = [
        ("500", 500, |_| ()),
        ("no section `vm`", 1, |sections| sections.retain(|section| section.name != "vm")),
        ("shape", 1, |sections| sections[0].bytes.push(0)),
        ("shape", 1, |sections| sections[0].bytes.truncate(3)),
        ("version 99", 1, |sections| sections[0].version = 99),
        ("vcpu0", 1, |sections| sections.iter_mut().for_each(claim_4_gib)),
    ];
    let (honest, forged) = (Saved::counter()?, Saved::counter()?);
    for (what, vcpus, change) in lies {
        forge::sections(&honest.path, &forged.path, vcpus, change)?;
        forged.is_refused(&[what])?;
    }
    Ok(())
}

fn claim_4_gib(section: &mut Section) {
    if section.name == "vcpu0" {
        section.bytes = vec![0xff, 0xff, 0xff, 0xff, 0x0f];
    }
}

impl Saved {
    fn restore_is_refused(&self, what: &str) -> Result<()> {
        let path = self.path.to_str().context("path")?;
        refused_in(self.dir.path(), vmm_with(["restore", path]), 1, &[path, what]).map(drop)
    }
}

#[test]
fn honest_ones_are_shown_by_inspect_readelf_and_gdb() -> Result<()> {
    let saved = Saved::of(|dir| Ok(Guest::bare("smp", dir)?.cpus(2)))?;
    let path = saved.path.to_str().context("path")?;
    let json: serde_json::Value = serde_json::from_slice(&vmm(["inspect", "--json", path])?.stdout)?;
    ensure!(json["vcpus"] == 2 && json["ram"]["bytes"] == 128 << 20, "{json}");

    let readelf = shown(Command::new("readelf").args(["-lnW", path]))?;
    ensure!(readelf.matches("NT_PRSTATUS").count() == 2, "{readelf}");
    for word in ["CORE (Core file)", "LOAD", "VMMSNAP"] {
        ensure!(readelf.contains(word), "no {word} in: {readelf}");
    }

    let registers = "thread apply all info registers rip rsp";
    let gdb = shown(Command::new("gdb").args(["-nx", "-batch", "-ex", registers, "-c", path]))?;
    for vcpu in &load::state(&load::open(&saved.path)?)?.vcpus {
        for value in [vcpu.regs.rip, vcpu.regs.rsp] {
            ensure!(gdb.contains(&format!("{value:#x} ")), "no {value:#x} in: {gdb}");
        }
    }
    Ok(())
}

/// An output that takes nothing is told in one line, if there is anywhere to tell it; it used to be a panic.
#[test]
fn honest_ones_that_cannot_be_printed() -> Result<()> {
    let saved = Saved::counter()?;
    let path = saved.path.to_str().context("path")?;
    let full = || OpenOptions::new().write(true).open("/dev/full");
    for args in [&["inspect", path][..], &["inspect", "--json", path], &["verify", path], &["doctor"]] {
        let (mut told, mut silent) = (vmm_with(args.iter().copied()), vmm_with(args.iter().copied()));
        let output = told.stdout(full()?).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{args:?}: {said}");
        ensure!(said.contains("cannot print"), "{args:?}: {said}");
        let status = silent.stdout(full()?).stderr(full()?).status()?;
        ensure!(status.code() == Some(1), "{args:?}: {status}");
    }
    Ok(())
}

/// What a tool prints when it has nothing to complain of.
fn shown(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaints.is_empty(), "{command:?}: {complaints}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Our own guests have a build id and no release.
#[test]
fn of_another_kernel_than_expected() -> Result<()> {
    let saved = Saved::counter()?;
    let path = saved.path.to_str().context("path")?;
    let json: serde_json::Value = serde_json::from_slice(&vmm(["inspect", "--json", path])?.stdout)?;
    let id = json["kernel_build_id"].as_str().context("no build id")?;
    let near = format!("{}{}", if id.starts_with('0') { '1' } else { '0' }, &id[1..]);
    for other in ["6.12", "0123456789abcdef", &id[..7], &near] {
        for way in ["--allow-changed-disks", "--via-stub"] {
            let command = vmm_with(["restore", path, way, "--expect-kernel", other]);
            refused_in(saved.dir.path(), command, 1, &[path, id, "expected", other])?;
        }
    }
    let command = vmm_with(["restore", path, "--expect-kernel", "a\nb"]);
    refused_in(saved.dir.path(), command, 2, &["--expect-kernel"])?;
    TestVm::restore_with(&saved.path, &["--expect-kernel", &id[..8]])?.wait_for("tick ")?;
    Ok(())
}
