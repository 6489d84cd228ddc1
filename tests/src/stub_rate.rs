//! How fast the restore stub puts RAM in place, beside the host's `memcpy`.
//!
//! In: a snapshot. Out: bytes per second of both, of the pages that are not zero. Holds: both copy the same runs of the same
//! mapped file into fresh memory, by turns, so that page faults and what else the machine does slow both; the stub checks and
//! digests besides.

use crate::figures::median;
use anyhow::{Context, Result, bail, ensure};
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm::ram::GuestRam;
use vmm::stub::{self, ImageMapping};
use vmm::{load, vm};

const ROUNDS: usize = 5;
const PAGE: usize = 4096;

/// Medians of both.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Bytes that are copied.
    pub bytes: u64,
    /// The stub: from its first instruction to its last.
    pub stub: Duration,
    /// The host, into memory that nobody has touched.
    pub fresh: Duration,
    /// The host, once more to the same place.
    pub warm: Duration,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = |time: Duration| self.bytes as f64 / time.as_secs_f64() / f64::from(1 << 20);
        let [stub, fresh, warm] = [self.stub, self.fresh, self.warm].map(rate);
        write!(
            f,
            "{} MiB of data; stub {stub:.0} MiB/s, host's memcpy {fresh:.0} MiB/s to fresh pages (stub/host {:.2}) and \
             {warm:.0} MiB/s to pages that are there (stub/host {:.2})",
            self.bytes >> 20,
            stub / fresh,
            stub / warm
        )
    }
}

/// A run of pages that are not zero: guest physical address and bytes.
type Run = (u64, usize);

/// Measures with this file.
///
/// # Errors
/// It is no snapshot, or this host has no KVM.
pub fn measure(path: &Path) -> Result<Rate> {
    let snapshot = load::open(path)?;
    let (kvm, source) = (vm::open()?, load::ram(&snapshot)?);
    let runs = runs(&source, &snapshot.manifest().ram.ranges)?;
    let image = ImageMapping::new(&File::open(path)?)?;
    let (mut stubs, mut fresh, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        stubs.push(stub::overlay(&kvm, &image, GuestRam::new)?.0.time);
        let target = GuestRam::new(snapshot.manifest().ram.bytes)?;
        fresh.push(copy(&source, &target, &runs)?);
        warm.push(copy(&source, &target, &runs)?);
    }
    let [Some(stub), Some(fresh), Some(warm)] = [stubs, fresh, warm].map(median_time) else {
        bail!("no rounds");
    };
    Ok(Rate { bytes: runs.iter().map(|(_, len)| *len as u64).sum(), stub, fresh, warm })
}

/// Reads all, so that the file is in the page cache for both.
fn runs(ram: &GuestRam, ranges: &[snapshot::RamRange]) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    let mut chunk = vec![0; snapshot::CHUNK_SIZE as usize];
    for range in ranges {
        for gpa in (range.gpa..range.gpa + range.len).step_by(chunk.len()) {
            let len = chunk.len().min((range.gpa + range.len - gpa) as usize);
            if !ram.read_touched(gpa, &mut chunk[..len])? {
                continue;
            }
            for (page, at) in chunk[..len].chunks(PAGE).zip((gpa..).step_by(PAGE)) {
                match runs.last_mut() {
                    _ if page.iter().all(|byte| *byte == 0) => {}
                    Some((start, len)) if *start + *len as u64 == at => *len += PAGE,
                    _ => runs.push((at, PAGE)),
                }
            }
        }
    }
    ensure!(!runs.is_empty(), "a snapshot without data");
    Ok(runs)
}

fn copy(from: &GuestRam, to: &GuestRam, runs: &[Run]) -> Result<Duration> {
    let started = Instant::now();
    for (gpa, len) in runs {
        let place = |ram: &GuestRam| {
            let slice = ram.memory().get_slice(GuestAddress(*gpa), *len).context("no RAM there")?;
            anyhow::Ok(slice.ptr_guard_mut().as_ptr())
        };
        let (from, to) = (place(from)?, place(to)?);
        // SAFETY: both ranges are mapped, of this length, and of different memory; nobody else writes either.
        unsafe { std::ptr::copy_nonoverlapping(from, to, *len) };
    }
    Ok(started.elapsed())
}

fn median_time(times: Vec<Duration>) -> Option<Duration> {
    median(times.iter().map(Duration::as_secs_f64).collect()).map(Duration::from_secs_f64)
}
