//! The restore stub: a guest of our own checks a snapshot and puts its RAM in place.
//!
//! In: an open file of which nothing is known, a way to get RAM. Out: that RAM as the file has it, and what the stub saw. Holds:
//! here no byte of the file is looked at; what the stub says of it is bounded before it is believed; no other guest has run.
//!
//! The stub's VM is thrown away afterwards. It has one vCPU, from its first instruction in ring 3, no interrupt controller, and
//! memory at these guest physical addresses:
//!
//! ```text
//!            0  guest RAM, once the stub has asked for it; it ends below 4 GiB + the file's length
//! 4 GiB + file  stub: program, stack, parameters, page tables, map of holes; from a multiple of 1 GiB on
//!         then  the file, read-only; from a multiple of 2 MiB on
//! ```

mod cpu;
mod image;
mod near;
mod staging;
mod tables;
mod vectors;

pub use image::ImageMapping;

use crate::config::{self, ConfigError};
use crate::kvm::Ioctl;
use crate::layout;
use crate::ram::{GuestRam, RamError};
use cpu::{Call, StubVm};
use kvm_ioctls::Kvm;
pub use restore_stub::Vectors;
use restore_stub::abi;
use snapshot::{HEADER_LEN, RAM_RANGES_MAX};
use std::io;
use std::time::{Duration, Instant};

/// Why the stub put no RAM in place.
#[derive(Debug, thiserror::Error)]
pub enum StubError {
    /// The file can't be mapped, or the host won't tell its holes.
    #[error("cannot map the snapshot for the restore stub")]
    Image(#[source] io::Error),
    /// There is no room for it in a guest's address space.
    #[error("the restore stub has room for files of up to {max} bytes on this host, and this one has {len}")]
    TooLong {
        /// The file's length.
        len: u64,
        /// The longest.
        max: u64,
    },
    /// The host has no memory for the stub itself.
    #[error("cannot get {bytes} bytes of memory for the restore stub: {reason}")]
    Memory {
        /// As many as it needs.
        bytes: u64,
        /// What the host said.
        reason: String,
    },
    /// A check failed. The text is the stub's.
    #[error("the restore stub refuses it: {0}")]
    Refused(String),
    /// The file's RAM is laid out as no machine's is.
    #[error("the restore stub refuses it: RAM ranges that no machine with {0} bytes of memory has")]
    Ranges(u64),
    /// The host is too small.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The stub did what it should not.
    #[error("the restore stub failed: {0}")]
    Failed(String),
    /// A KVM call failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
}

/// What the stub did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Runs of pages that were copied.
    pub runs: u64,
    /// Pages that were copied.
    pub pages: u64,
    /// Pages that are zero; none of them was written.
    pub zero_pages: u64,
    /// XXH3 of the digests of all chunks of RAM, in the order of guest addresses, each computed from what is in RAM.
    pub digest: u64,
    /// The fixed header of the notes that the stub has checked.
    pub header: [u8; HEADER_LEN],
    /// What the stub said, its last line.
    pub line: String,
    /// From the stub's first instruction to its last.
    pub time: Duration,
}

/// Runs the stub over a file, which may be hostile. `ram` is asked for zeroed RAM of a machine with that many bytes, once all of
/// the file but RAM has been checked.
///
/// # Errors
/// A file that the stub refuses, by the check that failed; or a host that lacks what the stub needs.
pub fn overlay(
    kvm: &Kvm,
    image: &ImageMapping,
    ram: impl FnOnce(u64) -> Result<GuestRam, RamError>,
) -> Result<(Report, GuestRam), StubError> {
    overlay_by(kvm, image, ram, Vectors::Avx512)
}

/// The same on a processor that has no wider registers than these.
///
/// # Errors
/// As [`overlay`].
pub fn overlay_by(
    kvm: &Kvm,
    image: &ImageMapping,
    ram: impl FnOnce(u64) -> Result<GuestRam, RamError>,
    widest: Vectors,
) -> Result<(Report, GuestRam), StubError> {
    // Declared first, so that it is dropped after the VM that uses it.
    let given;
    let mut vm = StubVm::new(kvm, image, widest)?;
    let started = Instant::now();
    expect(&vm.run()?, abi::WANT_RAM)?;
    let memory = machine_memory(&vm, image.len())?;
    config::check_host_memory(memory)?;
    given = ram(memory)?;
    vm.give_ram(&given)?;
    let call = vm.run()?;
    expect(&call, abi::GO)?;
    let [runs, pages, zero_pages, digest] =
        [abi::RUNS, abi::PAGES, abi::ZERO_PAGES, abi::DIGEST].map(|word| vm.parameter(word));
    let report = Report {
        runs,
        pages,
        zero_pages,
        digest,
        header: header(&vm),
        line: call.said,
        time: started.elapsed(),
    };
    drop(vm);
    Ok((report, given))
}

/// Refuses any other word than the one that is due.
fn expect(call: &Call, word: u8) -> Result<(), StubError> {
    match call.word {
        found if found == word => Ok(()),
        abi::REFUSED => Err(StubError::Refused(call.said.clone())),
        abi::FAILED => Err(StubError::Failed(call.said.clone())),
        other => Err(StubError::Failed(format!("it said {other} where {word} was due"))),
    }
}

/// The bytes of RAM of the machine that the stub has found: its ranges are those of a machine of ours, and all in the file.
fn machine_memory(vm: &StubVm<'_>, file_len: u64) -> Result<u64, StubError> {
    let count = (vm.parameter(abi::RANGE_COUNT) as usize).min(RAM_RANGES_MAX);
    let word = |index| vm.parameter(abi::RANGES + index);
    let ranges: Vec<_> = (0..count).map(|range| (word(2 * range), word(2 * range + 1))).collect();
    let memory = ranges.iter().fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
    if memory < config::MEMORY_MIN || memory > file_len || ranges != layout::ram_ranges(memory) {
        return Err(StubError::Ranges(memory));
    }
    Ok(memory)
}

fn header(vm: &StubVm<'_>) -> [u8; HEADER_LEN] {
    let words = abi::HEADER..abi::HEADER + HEADER_LEN.div_ceil(8);
    let bytes: Vec<u8> = words.flat_map(|word| vm.parameter(word).to_le_bytes()).collect();
    std::array::from_fn(|at| bytes[at])
}
