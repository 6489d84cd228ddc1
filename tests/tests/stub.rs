//! The restore stub on this host's KVM, with our own guests: what it says of a file, what it leaves in RAM, and what it refuses.
//!
//! These tests need a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;
use snapshot::{CHUNK_SIZE, ChunkContent, Contents, RamRange, RamSource, Registers};
use snapshot_format::Image;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};
use vmm::ram::GuestRam;
use vmm::stub::{self, ImageMapping, Report, StubError, Vectors};
use vmm::vm;
use vmm_tests::guests::Guest;
use vmm_tests::stories::{self, refused_in, vmm_with};
use vmm_tests::vm::TestVm;

fn overlay(kvm: &Kvm, path: &Path) -> Result<(Report, GuestRam), StubError> {
    let image = ImageMapping::new(&File::open(path).map_err(StubError::Image)?)?;
    stub::overlay(kvm, &image, GuestRam::new)
}

fn saved(memory: &str) -> Result<(TempDir, PathBuf)> {
    let dir = tempdir()?;
    let guest = Guest::bare("counter", dir.path())?.memory(memory);
    let path = dir.path().join("saved");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&path)?;
    Ok((dir, path))
}

#[test]
fn guests_go_on_from_where_it_put_them() -> Result<()> {
    for name in ["counter", "registers", "timer", "dirty"] {
        let dir = tempdir()?;
        stories::by_stub(&Guest::bare(name, dir.path())?, dir.path())?;
    }
    let dir = tempdir()?;
    stories::by_stub(&Guest::bare("smp", dir.path())?.cpus(4), dir.path())
}

/// A host may have any of these. The widest that this one has stands in for those that it hasn't.
#[test]
fn it_does_the_same_with_registers_of_any_width() -> Result<()> {
    let kvm = vm::open()?;
    let (_dir, path) = saved("5M")?;
    let image = ImageMapping::new(&File::open(&path)?)?;
    let report = |widest| anyhow::Ok(stub::overlay_by(&kvm, &image, GuestRam::new, widest)?.0.line);
    let lines = [Vectors::Sse2, Vectors::Avx2, Vectors::Avx512].map(report);
    let [narrow, middle, wide] = lines;
    let (narrow, middle, wide) = (narrow?, middle?, wide?);
    ensure!(narrow == middle && narrow == wide && narrow.ends_with(" go"), "{narrow}, {middle}, {wide}");
    Ok(())
}

/// RAM above 4 GiB is a range of its own.
#[test]
fn its_ram_is_that_of_a_restore_by_the_host() -> Result<()> {
    let kvm = vm::open()?;
    for memory in ["3M", "5M", "129M", "3100M"] {
        let (_dir, path) = saved(memory)?;
        let snapshot = vmm::load::open(&path)?;
        let (report, mine) = overlay(&kvm, &path)?;
        let theirs = vmm::load::ram(&snapshot)?;
        ensure!(report.digest == snapshot.ram_digest(), "{memory}: {}", report.line);
        for range in &snapshot.manifest().ram.ranges {
            for at in (range.gpa..range.gpa + range.len).step_by(CHUNK_SIZE as usize) {
                let len = (range.gpa + range.len - at).min(CHUNK_SIZE) as usize;
                ensure!(bytes(&mine, at, len)? == bytes(&theirs, at, len)?, "{memory}: RAM at {at:#x}");
            }
        }
    }
    Ok(())
}

/// What was never touched is zero.
fn bytes(ram: &GuestRam, gpa: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    ram.read_touched(gpa, &mut bytes)?;
    Ok(bytes)
}

/// Outside RAM the stub says what the same parser says here. Every byte is flipped in the snapshot crate's tests.
#[test]
fn a_flipped_byte_is_refused_by_the_check_that_found_it() -> Result<()> {
    let kvm = vm::open()?;
    let (_dir, path) = saved("4M")?;
    let mut bytes = fs::read(&path)?;
    let ram = vmm::load::open(&path)?.ram()[0].offset as usize;
    let mut said = std::collections::BTreeSet::new();
    for offset in (0..ram).step_by(61) {
        bytes[offset] ^= 1 << (offset % 8);
        fs::write(&path, &bytes)?;
        let expected = Image::check(&bytes).err().context("taken")?.to_string();
        match overlay(&kvm, &path) {
            Err(StubError::Refused(text)) if text == expected => said.insert(text),
            other => anyhow::bail!("byte {offset}: {other:?} where \"{expected}\" was due"),
        };
        bytes[offset] ^= 1 << (offset % 8);
    }
    ensure!(said.len() > 10, "{said:?}");
    for offset in [ram, ram + 0x10_0000 + 5, bytes.len() - 1] {
        bytes[offset] ^= 0x20;
        fs::write(&path, &bytes)?;
        let chunk = format!("the RAM chunk at GPA {:#x}", (offset - ram) / 0x10_0000 * 0x10_0000);
        match overlay(&kvm, &path) {
            Err(StubError::Refused(text)) if text.starts_with(&chunk) => {}
            other => anyhow::bail!("byte {offset}: {other:?} where \"{chunk}\" was due"),
        }
        bytes[offset] ^= 0x20;
    }
    fs::write(&path, &bytes)?;
    overlay(&kvm, &path).map(drop).map_err(Into::into)
}

#[test]
fn a_file_of_any_length_is_refused_but_one() -> Result<()> {
    let kvm = vm::open()?;
    let (_dir, path) = saved("4M")?;
    let len = fs::metadata(&path)?.len();
    for cut in [len + 1, len - 1, len - 4096, len / 2, 8192, 4096, 4095, 120, 119, 64, 63, 4, 3, 1, 0] {
        File::options().write(true).open(&path)?.set_len(cut)?;
        let said = match overlay(&kvm, &path) {
            Err(StubError::Refused(text)) => text,
            other => anyhow::bail!("{cut} of {len} bytes: {other:?}"),
        };
        let expected = if cut == 0 { "empty".to_owned() } else { format!("{cut} bytes") };
        ensure!(said.contains(&expected), "{cut}: {said}");
    }
    Ok(())
}

/// Whoever can write to the file can shorten it.
#[test]
fn a_file_that_is_shortened_meanwhile_is_a_failure() -> Result<()> {
    let kvm = vm::open()?;
    let (_dir, path) = saved("4M")?;
    let file = File::options().read(true).write(true).open(&path)?;
    for len in [2 << 20, 0] {
        let image = ImageMapping::new(&file)?;
        file.set_len(len)?;
        match stub::overlay(&kvm, &image, GuestRam::new) {
            Err(StubError::Failed(text)) if text.contains("shortened") => {}
            other => anyhow::bail!("{len}: {other:?}"),
        }
        file.set_len(4 << 20)?;
    }
    Ok(())
}

/// A snapshot in itself right, of a machine whose RAM lies where ours has none. No RAM is taken for it.
#[test]
fn ram_that_no_machine_has_is_refused() -> Result<()> {
    let kvm = vm::open()?;
    let (dir, path) = saved("4M")?;
    let about = vmm::load::open(&path)?.manifest().about.clone();
    let (forged, mib) = (dir.path().join("forged"), 1 << 20);
    for ranges in [vec![(mib, 4 * mib)], vec![(0, mib)], vec![(0, 4 * mib), (1 << 40, 4 * mib)]] {
        let ranges = ranges.into_iter().map(|(gpa, len)| RamRange { gpa, len }).collect();
        let (ram, vcpus) = (Zeroes(ranges), [Registers::default()]);
        let contents = Contents {
            about: about.clone(),
            vcpus: &vcpus,
            vmcoreinfo: None,
            sections: &[],
            ram: &ram,
            delta: None,
        };
        snapshot::write(&forged, &contents, &mut |_, _| {})?;
        let image = ImageMapping::new(&File::open(&forged)?)?;
        match stub::overlay(&kvm, &image, |_| panic!("RAM is asked for")) {
            Err(StubError::Ranges(_)) => {}
            other => anyhow::bail!("{:?}: {other:?}", ram.0),
        }
    }
    Ok(())
}

struct Zeroes(Vec<RamRange>);

impl RamSource for Zeroes {
    fn ranges(&self) -> &[RamRange] {
        &self.0
    }

    fn read_chunk(&self, _: u64, _: &mut [u8]) -> std::io::Result<ChunkContent> {
        Ok(ChunkContent::Zero)
    }
}

#[test]
fn refusals_are_one_line_and_leave_nothing() -> Result<()> {
    let (dir, path) = saved("4M")?;
    let honest = fs::read(&path)?;
    let ram = vmm::load::open(&path)?.ram()[0].offset as usize;
    // In the ELF header, a program header, the notes, RAM.
    let flips =
        [(4, "EI_CLASS"), (124, "PT_LOAD"), (ram - 4096, ""), (ram + (1 << 20), "RAM chunk at GPA 0x100000")];
    for (offset, what) in flips {
        let mut bytes = honest.clone();
        bytes[offset] ^= 0x40;
        fs::write(&path, &bytes)?;
        let name = path.to_str().context("path")?;
        let words = [name, "the restore stub refuses it: ", what];
        refused_in(dir.path(), vmm_with(["restore", "--via-stub", name]), 1, &words)?;
    }
    fs::write(&path, "not a snapshot\n")?;
    let name = path.to_str().context("path")?;
    refused_in(dir.path(), vmm_with(["restore", "--via-stub", name]), 1, &[name, "not an ELF file"]).map(drop)
}
