//! Snapshots that somebody made on purpose: every CRC right, and a machine inside that cannot be.
//!
//! In: an honest snapshot and what to change in it. Out: another file. Holds: the format's own writer makes it, so a reader
//! has to find the lie in the state itself.

use anyhow::{Context, Result};
use serde::Serialize;
use snapshot::{ChunkContent, Contents, RamRange, RamSource, Registers, Section, Snapshot};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmm::capture::MachineState;
use vmm::load;
use vmm::save::{BOARD, SECTION_VERSION, SHAPE, VM, vcpu_section};

/// Writes a snapshot of the same RAM with another state.
///
/// # Errors
/// A file can't be read or written.
pub fn state(honest: &Path, forged: &Path, change: impl FnOnce(&mut MachineState)) -> Result<()> {
    let mut state = load::state(&load::open(honest)?)?;
    let vcpus = state.vcpus.len();
    change(&mut state);
    let mut made = vec![made(SHAPE, &state.shape)?, made(VM, &state.vm)?, made(BOARD, &state.board)?];
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        made.push(self::made(&vcpu_section(index), vcpu)?);
    }
    // What is no part of the state stays as it is.
    sections(honest, forged, vcpus, |sections| {
        sections.retain(|section| made.iter().all(|made| made.name != section.name));
        sections.extend(made);
    })
}

/// Writes a snapshot of the same RAM with other sections, which claims to have this many vCPUs.
///
/// # Errors
/// A file can't be read or written.
pub fn sections(
    honest: &Path,
    forged: &Path,
    vcpus: usize,
    change: impl FnOnce(&mut Vec<Section>),
) -> Result<()> {
    let snapshot = load::open(honest)?;
    let copy = |section: snapshot::SectionRef<'_>| Section {
        name: section.name.to_owned(),
        version: section.version,
        bytes: section.bytes.to_vec(),
    };
    let mut sections: Vec<_> = snapshot.sections().map(copy).collect();
    change(&mut sections);
    let about = snapshot.manifest().about.clone();
    let registers = vec![Registers::default(); vcpus];
    let ram = SameRam(&snapshot);
    let vmcoreinfo = snapshot.vmcoreinfo();
    let contents =
        Contents { about, vcpus: &registers, vmcoreinfo, sections: &sections, ram: &ram, delta: None };
    snapshot::write(forged, &contents, &mut |_, _| {}).context("cannot forge")?;
    Ok(())
}

fn made<T: Serialize>(name: &str, value: &T) -> Result<Section> {
    Ok(Section::encode(name, SECTION_VERSION, value)?)
}

struct SameRam<'a>(&'a Snapshot);

impl RamSource for SameRam<'_> {
    fn ranges(&self) -> &[RamRange] {
        &self.0.manifest().ram.ranges
    }

    fn read_chunk(&self, gpa: u64, buf: &mut [u8]) -> io::Result<ChunkContent> {
        let holds = |range: &RamRange| (range.gpa..range.gpa + range.len).contains(&gpa);
        let mapped = self.0.ram().iter().find(|mapped| holds(&mapped.range));
        let mapped = mapped.ok_or_else(|| io::Error::other("no such RAM"))?;
        self.0.file().read_exact_at(buf, mapped.offset + gpa - mapped.range.gpa)?;
        Ok(ChunkContent::Data)
    }
}
