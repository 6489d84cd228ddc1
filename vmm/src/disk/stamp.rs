//! By what a later write to a disk is noticed.
//!
//! In: an open disk whose writes are all done and synced. Out: a [`Stamp`], which costs nothing and changes with every write,
//! and if wanted a [`Digest`] of all its bytes. Holds: two equal stamps mean the same bytes, unless somebody set a file's time
//! back; unequal ones mean nothing, and then the digest decides.

use super::DiskFile;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, Metadata, read_to_string};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::time::Duration;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes that are digested, compared with zero and copied at once.
pub(super) const CHUNK: u64 = 1 << 20;

/// Changes when a disk is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stamp {
    /// A regular file. Not its `ctime`, which also changes when it is renamed, nor its device number, which is another
    /// after a reboot.
    File {
        /// Inode number.
        inode: u64,
        /// Last change of its bytes, in nanoseconds since 1970.
        modified_ns: i128,
    },
    /// A block device, as long as its host is up.
    Device {
        /// The host's boot id.
        boot_id: String,
        /// A number that no two devices share (`/sys/block/*/diskseq`).
        sequence: String,
        /// Sectors written and discarded (Documentation/block/stat.rst).
        sectors: u64,
    },
}

/// A digest of a disk's bytes: xxh3-128 over the number and the xxh3-128 of each MiB that is not all zero. It is the same for
/// a copy, with or without holes. It finds accidents; who wants to make another disk of the same digest can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest(pub [u8; 16]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl Stamp {
    /// The disk's, as of now; none for a block device that does not count its writes.
    ///
    /// # Errors
    /// What the host said.
    pub fn of(disk: &DiskFile) -> io::Result<Option<Self>> {
        let about = disk.file.metadata()?;
        if about.file_type().is_block_device() {
            // What others have written so far is counted only once it has left the page cache.
            disk.file.sync_data()?;
            return Ok(device(&about));
        }
        Ok(Some(Self::File { inode: about.ino(), modified_ns: modified_ns(&about) }))
    }

    /// The same, and no later write can leave it. Takes a few milliseconds.
    ///
    /// # Errors
    /// What the host said.
    pub fn settled(disk: &DiskFile) -> io::Result<Option<Self>> {
        let_the_clock_tick(&disk.file)?;
        Self::of(disk)
    }
}

/// When a file's bytes changed last, in nanoseconds since 1970.
pub(super) fn modified_ns(about: &Metadata) -> i128 {
    i128::from(about.mtime()) * 1_000_000_000 + i128::from(about.mtime_nsec())
}

/// Waits, for a few milliseconds at most, until a write would give the file another time than it has: the kernel's clock for
/// that goes in ticks, and two writes in one tick look alike.
///
/// # Errors
/// The file's time can't be read.
fn let_the_clock_tick(file: &File) -> io::Result<()> {
    let written = modified_ns(&file.metadata()?);
    for _ in 0..100 {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        // A time in the future is left by the next write too.
        if i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec) != written {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn device(about: &Metadata) -> Option<Stamp> {
    let (major, minor) = (rustix::fs::major(about.rdev()), rustix::fs::minor(about.rdev()));
    let read = |name: &str| read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}"));
    // A partition's queue is its disk's.
    let counted = read("queue/iostats").or_else(|_| read("../queue/iostats")).ok()?;
    let sequence = read("diskseq").or_else(|_| read("../diskseq")).ok()?;
    let boot_id = read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let stat = read("stat").ok()?;
    let numbers: Vec<u64> = stat.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    if counted.trim() != "1" {
        return None;
    }
    // Not the number of requests, among which a flush without bytes counts as a write.
    let sectors = numbers.get(6)?.wrapping_add(*numbers.get(13)?);
    Some(Stamp::Device { boot_id: boot_id.trim().to_owned(), sequence: sequence.trim().to_owned(), sectors })
}

/// Collects a [`Digest`] chunk by chunk.
#[derive(Default)]
pub(super) struct Digester(Xxh3);

impl Digester {
    /// The chunk of that number, not all of it zero.
    pub(super) fn add(&mut self, number: u64, chunk: &[u8]) {
        self.0.update(&number.to_le_bytes());
        self.0.update(&xxh3_128(chunk).to_le_bytes());
    }

    pub(super) fn digest(&self) -> Digest {
        Digest(self.0.digest128().to_be_bytes())
    }
}

impl Digest {
    /// Reads all that isn't a hole.
    ///
    /// # Errors
    /// What the host said.
    pub fn of(disk: &DiskFile) -> io::Result<Self> {
        let mut digester = Digester::default();
        each_chunk(&disk.file, disk.size, |number, chunk| {
            digester.add(number, chunk);
            Ok(())
        })?;
        Ok(digester.digest())
    }
}

/// Calls `with` for each chunk that isn't all zero, with its number. Holes are not read.
pub(super) fn each_chunk(
    file: &File,
    size: u64,
    mut with: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buf = vec![0; CHUNK as usize];
    let mut at = 0;
    while let Some(data) = next_data(file, at, size)? {
        let number = data / CHUNK;
        let start = number * CHUNK;
        let chunk = &mut buf[..(size - start).min(CHUNK) as usize];
        file.read_exact_at(chunk, start)?;
        if chunk.iter().any(|&byte| byte != 0) {
            with(number, chunk)?;
        }
        at = start + CHUNK;
    }
    Ok(())
}

/// Where data goes on at or after `at`. A block device knows no holes, and says so by an error.
pub(super) fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<u64>> {
    if at >= size {
        return Ok(None);
    }
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Ok((data < size).then_some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}
