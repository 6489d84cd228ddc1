//! Load: a snapshot file becomes a machine's state and RAM, if it is whole and this host can run it.
//!
//! In: a path. Out: [`MachineState`] and [`GuestRam`]. Holds: a snapshot is a stranger's until all of it but RAM has been
//! checked, and what it claims is held against this machine's layout and this host before KVM sees any of it.

use crate::board::BoardState;
use crate::capture::MachineState;
use crate::config::{self, ConfigError, Shape};
use crate::disk::{self, Disk, DiskPlace, DiskRecord, DisksError};
use crate::kernel_id::{self, KernelId};
use crate::kvm::Ioctl;
use crate::ram::{FileRange, GuestRam, Layer, RamError};
use crate::save::{BOARD, DISKS, SECTION_VERSION, SHAPE, VM, VOUCHER, vcpu_section};
use crate::stub::{self, ImageMapping, Report, StubError};
use crate::voucher::Voucher;
use crate::{cpuid, layout};
use kvm_ioctls::Kvm;
use serde::de::DeserializeOwned;
use snapshot::{
    Chain, ChainError, OpenError, Piece, SealError, SealKey, SectionError, Snapshot, UnverifiedSnapshot,
    VerifyError,
};
use std::path::Path;
use std::sync::Arc;

/// Why a snapshot was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is damaged, or something else.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// It needs another, which can't be had.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It was written by somebody else.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A part is missing.
    #[error("{path}: no section `{name}`: not a machine that this monitor can restore")]
    Missing {
        /// The snapshot.
        path: String,
        /// The section.
        name: String,
    },
    /// A part doesn't decode.
    #[error("{path}")]
    Section {
        /// The snapshot.
        path: String,
        /// What is wrong.
        source: SectionError,
    },
    /// The parts contradict each other or this monitor's layout.
    #[error("{path}: {reason}")]
    Shape {
        /// The snapshot.
        path: String,
        /// What contradicts what.
        reason: String,
    },
    /// A disk's record makes no sense, or the disk is not what it was.
    #[error("{path}")]
    Disks {
        /// The snapshot.
        path: String,
        /// Which, and why.
        source: DisksError,
    },
    /// This host is smaller than the machine.
    #[error(transparent)]
    Host(#[from] ConfigError),
    /// This host's processor is another.
    #[error("{path} needs {needed}; this host has not")]
    Processor {
        /// The snapshot.
        path: String,
        /// What the guest was promised.
        needed: String,
    },
    /// This process may open no more files.
    #[error("cannot keep the snapshot open")]
    Descriptor(#[source] std::io::Error),
    /// The restore stub would not or could not put its RAM in place.
    #[error("{path}")]
    Stub {
        /// The snapshot.
        path: String,
        /// Why.
        source: StubError,
    },
    /// It is of another kernel.
    #[error("{path} is of kernel {found}; expected {expected}")]
    Kernel {
        /// The snapshot.
        path: String,
        /// Its kernel.
        found: KernelId,
        /// What somebody expected.
        expected: String,
    },
    /// It was written after the restore stub had checked it.
    #[error("{path}: its notes have changed since the restore stub checked them")]
    Changed {
        /// The snapshot.
        path: String,
    },
    /// A KVM call failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
    /// RAM could not be mapped.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Opens a snapshot and checks everything but its RAM.
///
/// # Errors
/// It can't be opened, is damaged, or is something else.
pub fn open(path: &Path) -> Result<Snapshot, LoadError> {
    Ok(UnverifiedSnapshot::open(path)?.verify()?)
}

/// The same of a snapshot that may be a difference to others, with these.
///
/// # Errors
/// One of them can't be opened, is damaged, or is something else.
pub fn open_chain(path: &Path) -> Result<Chain, LoadError> {
    Ok(Chain::open(path)?)
}

/// The same, if all of them were written with this key, when there is one.
///
/// # Errors
/// As [`open_chain`]; one of them was not.
pub fn open_own_chain(path: &Path, key: Option<&SealKey>) -> Result<Chain, LoadError> {
    let chain = open_chain(path)?;
    Ok(match key {
        Some(key) => chain.authenticate(key)?,
        None => chain,
    })
}

/// Opens a snapshot, of which the restore stub checks everything and puts the RAM in place. What the stub has checked is then
/// read here, so that the two see the same file even if its name moves on.
///
/// # Errors
/// It can't be opened, the stub refuses it, or somebody writes into it.
pub fn via_stub(kvm: &Kvm, path: &Path) -> Result<(Snapshot, GuestRam, Report), LoadError> {
    overlaid(kvm, UnverifiedSnapshot::open(path)?)
}

/// The same, of a snapshot that is open.
///
/// # Errors
/// As [`via_stub`].
pub fn overlaid(
    kvm: &Kvm,
    unverified: UnverifiedSnapshot,
) -> Result<(Snapshot, GuestRam, Report), LoadError> {
    let overlaid =
        ImageMapping::new(unverified.file()).and_then(|image| stub::overlay(kvm, &image, GuestRam::new));
    let path = || unverified.path().display().to_string();
    let (report, ram) = overlaid.map_err(|source| LoadError::Stub { path: path(), source })?;
    let snapshot = unverified.verify()?;
    if *snapshot.header() != report.header {
        return Err(LoadError::Changed { path: name(&snapshot) });
    }
    Ok((snapshot, ram, report))
}

/// The state in a snapshot, in itself consistent.
///
/// # Errors
/// Sections that are missing, damaged, or contradict each other.
pub fn state(snapshot: &Snapshot) -> Result<MachineState, LoadError> {
    let shape: Shape = section(snapshot, SHAPE)?;
    check_shape(snapshot, &shape)?;
    let vcpus = (0..shape.vcpus as usize).map(|index| section(snapshot, &vcpu_section(index)));
    let vcpus = vcpus.collect::<Result<_, _>>()?;
    let board: BoardState = section(snapshot, BOARD)?;
    Ok(MachineState { vm: section(snapshot, VM)?, vcpus, board, shape })
}

/// What the snapshot says of the machine's disks, in itself consistent.
///
/// # Errors
/// A section that is missing, damaged, or names what is no disk.
pub fn disks(snapshot: &Snapshot) -> Result<Vec<DiskRecord>, LoadError> {
    let records: Vec<DiskRecord> = section(snapshot, DISKS)?;
    disk::check(&records).map_err(|source| LoadError::Disks { path: name(snapshot), source })?;
    Ok(records)
}

/// Opens the machine's disks, where they were or where `places` says, and checks that they hold what they held then.
///
/// # Errors
/// A disk that can't be had, or was written since and `allow_changed` was not said.
pub fn open_disks(
    snapshot: &Snapshot,
    places: &[DiskPlace],
    allow_changed: bool,
) -> Result<Vec<Disk>, LoadError> {
    let opened = disk::open(&disks(snapshot)?, snapshot.path(), places, allow_changed);
    opened.map_err(|source| LoadError::Disks { path: name(snapshot), source })
}

/// Whether this host can run the machine.
///
/// # Errors
/// Names the first thing that it lacks.
pub fn check_host(kvm: &Kvm, snapshot: &Snapshot, state: &MachineState) -> Result<(), LoadError> {
    config::check_host_memory(state.shape.memory)?;
    if is_vouched_for(snapshot, state) {
        return Ok(());
    }
    let supported = cpuid::supported(kvm)?;
    let lacking = state.vcpus.iter().find_map(|vcpu| cpuid::first_lacking(&vcpu.cpuid, &supported));
    lacking.map_or(Ok(()), |needed| Err(LoadError::Processor { path: name(snapshot), needed }))
}

/// Whether it was this host, since it was started, that has run the machine.
fn is_vouched_for(snapshot: &Snapshot, state: &MachineState) -> bool {
    let voucher = snapshot.section(VOUCHER).and_then(|section| section.decode(SECTION_VERSION).ok());
    voucher.is_some_and(|voucher: Voucher| voucher.holds_for(&state.vcpus))
}

/// The snapshot's RAM, mapped privately.
///
/// # Errors
/// A host that won't map it.
pub fn ram(snapshot: &Snapshot) -> Result<GuestRam, LoadError> {
    let file = snapshot.file().try_clone().map_err(LoadError::Descriptor)?;
    let ranges: Vec<_> = snapshot
        .ram()
        .iter()
        .map(|mapped| FileRange { gpa: mapped.range.gpa, len: mapped.range.len, offset: mapped.offset })
        .collect();
    let about = (snapshot.manifest().about.generation, snapshot.ram_digest());
    Ok(GuestRam::from_snapshot(file, &ranges)?.watched(snapshot.path()).is_as_in(about.0, about.1))
}

/// The RAM of the last snapshot of a chain, each page mapped from the file that has it.
///
/// # Errors
/// A host that won't map it.
pub fn ram_of(chain: &Chain) -> Result<GuestRam, LoadError> {
    let links = chain.links();
    let base = ram(&links[links.len() - 1])?;
    if !chain.is_incremental() {
        return Ok(base);
    }
    let files = links.iter().map(|link| link.file().try_clone().map(Arc::new));
    let files = files.collect::<Result<Vec<_>, _>>().map_err(LoadError::Descriptor)?;
    let pieces = chain.pieces();
    let layer = |piece: &Piece| {
        let Piece { link, gpa, len, offset } = *piece;
        Layer { file: &files[link], path: links[link].path(), gpa, len, offset }
    };
    let layers: Vec<_> = pieces.iter().filter(|piece| piece.link + 1 < links.len()).map(layer).collect();
    let top = chain.top();
    Ok(base.with_layers(&layers)?.is_as_in(top.manifest().about.generation, top.ram_digest()))
}

/// Refuses a snapshot of any other kernel than the one of this release or build id.
///
/// # Errors
/// It is of another.
pub fn expect_kernel(snapshot: &Snapshot, expected: &str) -> Result<(), LoadError> {
    let found = KernelId::of(snapshot);
    if found.is(expected) {
        return Ok(());
    }
    Err(LoadError::Kernel { path: name(snapshot), found, expected: kernel_id::describe(expected) })
}

fn section<T: DeserializeOwned>(snapshot: &Snapshot, wanted: &str) -> Result<T, LoadError> {
    let missing = || LoadError::Missing { path: name(snapshot), name: wanted.to_owned() };
    let section = snapshot.section(wanted).ok_or_else(missing)?;
    section.decode(SECTION_VERSION).map_err(|source| LoadError::Section { path: name(snapshot), source })
}

/// The RAM ranges follow from the memory size; any others were made by someone else.
fn check_shape(snapshot: &Snapshot, shape: &Shape) -> Result<(), LoadError> {
    let refused = |reason: String| Err(LoadError::Shape { path: name(snapshot), reason });
    let manifest = snapshot.manifest();
    let ranges: Vec<_> = manifest.ram.ranges.iter().map(|range| (range.gpa, range.len)).collect();
    if !layout::VCPUS.contains(&shape.vcpus) || manifest.vcpus != shape.vcpus {
        return refused(format!("{} vCPUs in its manifest, {} in its machine", manifest.vcpus, shape.vcpus));
    }
    if shape.memory < config::MEMORY_MIN || ranges != layout::ram_ranges(shape.memory) {
        return refused(format!("RAM ranges that no machine with {} bytes of memory has", shape.memory));
    }
    check_texts(shape).or_else(refused)
}

/// These are shown on terminals.
fn check_texts(shape: &Shape) -> Result<(), String> {
    config::parse_name(&shape.name).map_err(|error| error.to_string())?;
    let version = shape.kernel.version.as_deref().unwrap_or_default();
    if version.chars().any(char::is_control) {
        return Err("its kernel's version has control characters".to_owned());
    }
    Ok(())
}

fn name(snapshot: &Snapshot) -> String {
    snapshot.path().display().to_string()
}
