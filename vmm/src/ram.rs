//! Guest RAM: where a guest's bytes live in this process.
//!
//! In: a memory size, or an open snapshot and where in it each range lies. Out: mapped guest memory, and for a capture,
//! which chunks were never touched. Holds: a fresh guest's RAM is a memfd; a restored one's is a private mapping of its
//! snapshot, so that the file never changes and clones share its pages.

use crate::layout::{PAGE_SIZE, ram_ranges};
use crate::lost_ram::{self, Watch};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host would not give an anonymous file of this size.
    #[error("cannot get {bytes} bytes of guest RAM from this host")]
    Memfd {
        /// Bytes asked for.
        bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// A range could not be mapped.
    #[error("cannot map {bytes} bytes of guest RAM at guest physical address {gpa:#x}: {reason}")]
    Map {
        /// Where the range begins.
        gpa: u64,
        /// Its length.
        bytes: u64,
        /// What the host said.
        reason: String,
    },
    /// The process's own view of its memory could not be opened.
    #[error("cannot open /proc/self/mem, by which a restored guest's RAM is read and written")]
    OwnMemory(#[source] io::Error),
}

const SHORTENED: &str = "the file that it is mapped from was shortened meanwhile";

/// One range of guest RAM inside a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins.
    pub offset: u64,
}

/// A guest's RAM. A clone is the same RAM.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    windows: Vec<Window>,
    mapped: Option<Arc<OwnMemory>>,
    watch: Option<Arc<Watch>>,
}

/// Memory that a guest may read beside its RAM: no part of a snapshot, and out of its devices' reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// Guest physical address at which address 0 of the memory is seen.
    pub base: u64,
    /// What is seen.
    pub memory: GuestMemoryMmap,
}

/// How RAM that is a snapshot's private mapping is read: by system calls. Whoever can write to the snapshot can shorten
/// it, and a load from what is gone would be a SIGBUS, where a system call fails.
#[derive(Debug)]
struct OwnMemory {
    /// Opened when it is needed first, which is not on a restore's way to the first instruction.
    pagemap: OnceLock<File>,
    mem: Arc<File>,
}

/// Writes guest RAM, wherever that is. Where it is a snapshot's mapping, by a system call, as it is read.
#[derive(Clone, Debug)]
pub struct RamWriter {
    memory: GuestMemoryMmap,
    mem: Option<Arc<File>>,
}

impl RamWriter {
    /// Writes `bytes` at a guest physical address.
    ///
    /// # Errors
    /// There is no RAM, or the snapshot that it is mapped from has lost this part of it.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(mem) = &self.mem else {
            return self.memory.write_slice(bytes, GuestAddress(gpa)).map_err(io::Error::other);
        };
        let target = self.memory.get_slice(GuestAddress(gpa), bytes.len()).map_err(io::Error::other)?;
        mem.write_all_at(bytes, target.ptr_guard().as_ptr() as u64).map_err(|_| io::Error::other(SHORTENED))
    }
}

impl GuestRam {
    /// Zeroed RAM of `bytes` in a memfd. Pages cost nothing until touched.
    ///
    /// # Errors
    /// When the host will not give so much address space.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        let file = Arc::new(memfd(bytes).map_err(|source| RamError::Memfd { bytes, source })?);
        let mut offset = 0;
        let mut regions = Vec::new();
        for (gpa, len) in ram_ranges(bytes) {
            regions.push(map(&file, FileRange { gpa, len, offset }, libc::MAP_SHARED)?);
            offset += len;
        }
        Ok(Self { memory: collect(regions)?, windows: Vec::new(), mapped: None, watch: None })
    }

    /// Memory from address 0 on with these bytes, whole pages, in a memfd.
    ///
    /// # Errors
    /// When the host will not give so much.
    pub fn of_bytes(bytes: &[u8]) -> Result<Self, RamError> {
        let len = bytes.len() as u64;
        let failed = |source| RamError::Memfd { bytes: len, source };
        let file = memfd(len).map_err(failed)?;
        file.write_all_at(bytes, 0).map_err(failed)?;
        let region = map(&Arc::new(file), FileRange { gpa: 0, len, offset: 0 }, libc::MAP_SHARED)?;
        Ok(Self { memory: collect(vec![region])?, windows: Vec::new(), mapped: None, watch: None })
    }

    /// RAM whose bytes are a snapshot's, mapped privately: what the guest writes never reaches the file.
    ///
    /// # Errors
    /// When a range can't be mapped.
    pub fn from_snapshot(file: File, ranges: &[FileRange]) -> Result<Self, RamError> {
        let file = Arc::new(file);
        let regions =
            ranges.iter().map(|range| map(&file, *range, libc::MAP_PRIVATE)).collect::<Result<_, _>>()?;
        Ok(Self {
            memory: collect(regions)?,
            windows: Vec::new(),
            mapped: Some(Arc::new(OwnMemory::open()?)),
            watch: None,
        })
    }

    /// The same, and if the snapshot at `path`, which it is mapped from, is shortened, that is told; see [`lost_ram`].
    pub fn watched(mut self, path: &Path) -> Self {
        let ends = self.memory.iter().filter_map(|region| Some((region.file_offset()?, region.len())));
        let end = ends.map(|(behind, len)| behind.start() + len).max();
        let file = self.memory.iter().find_map(|region| Some(region.file_offset()?.arc().clone()));
        let place = |region: &GuestRegionMmap| {
            let start = region.as_ptr() as usize;
            start..start + region.len() as usize
        };
        let ranges = self.memory.iter().map(place).collect();
        let watch = file.zip(end).map(|(file, end)| lost_ram::watch(path, &file, ranges, end));
        self.watch = watch.map(Arc::new);
        self
    }

    /// Why a part of it is lost, if it is.
    pub fn lost(&self) -> Option<&'static str> {
        self.watch.as_ref().and_then(|watch| watch.why())
    }

    /// The mapped memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The same RAM, with windows on other memory.
    pub fn with_windows(self, windows: Vec<Window>) -> Self {
        Self { windows, ..self }
    }

    /// What the guest may read beside it.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Whether this is a private mapping of a snapshot.
    pub fn is_from_snapshot(&self) -> bool {
        self.mapped.is_some()
    }

    /// A way to write guest memory for those who don't own it.
    pub fn writer(&self) -> RamWriter {
        RamWriter { memory: self.memory.clone(), mem: self.mapped.as_ref().map(|own| own.mem.clone()) }
    }

    /// Bytes of the host's memory that this RAM takes for itself: what a snapshot's mapping shares with the file is not
    /// counted. Zero where the host won't say.
    pub fn resident_bytes(&self) -> u64 {
        let taken = |region: &GuestRegionMmap| match (&self.mapped, region.file_offset()) {
            (Some(own), _) => {
                own.pages_of_its_own(region.as_ptr() as u64, region.len()).unwrap_or(0) * PAGE_SIZE
            }
            (None, Some(file)) if file.start() == 0 => file.file().metadata().map_or(0, |m| m.blocks() * 512),
            _ => 0,
        };
        self.memory.iter().map(taken).sum()
    }

    /// Reads guest bytes; `false`, with nothing read, when they are surely all zero because they were never touched.
    ///
    /// # Errors
    /// An address outside RAM, a host that won't say what was touched, or a snapshot that lost its end while in use.
    pub fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        let (region, start) = self
            .memory
            .to_region_addr(GuestAddress(gpa))
            .ok_or_else(|| io::Error::other(format!("no guest RAM at {gpa:#x}")))?;
        let behind = region.file_offset().ok_or_else(|| io::Error::other("guest RAM without a file"))?;
        let in_file = holds_data(behind.file(), behind.start() + start.0, buf.len() as u64)?;
        let host = region.as_ptr() as u64 + start.0;
        match &self.mapped {
            Some(own) if in_file || own.has_pages(host, buf.len() as u64)? => own.read(host, buf)?,
            None if in_file => self.memory.read_slice(buf, GuestAddress(gpa)).map_err(io::Error::other)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl OwnMemory {
    fn open() -> Result<Self, RamError> {
        let mem = File::options().read(true).write(true).open("/proc/self/mem");
        let mem = mem.map_err(RamError::OwnMemory)?;
        Ok(Self { pagemap: OnceLock::new(), mem: Arc::new(mem) })
    }

    fn pagemap(&self) -> io::Result<&File> {
        if let Some(open) = self.pagemap.get() {
            return Ok(open);
        }
        let opened = File::open("/proc/self/pagemap")?;
        Ok(self.pagemap.get_or_init(|| opened))
    }

    /// Whether the process has pages of its own in the range: present (bit 63) or swapped out (bit 62) in its page map
    /// (Documentation/admin-guide/mm/pagemap.rst).
    fn has_pages(&self, host: u64, len: u64) -> io::Result<bool> {
        let mut entries = vec![0u8; (len / PAGE_SIZE * 8) as usize];
        self.pagemap()?.read_exact_at(&mut entries, host / PAGE_SIZE * 8)?;
        Ok(entries.chunks_exact(8).any(|entry| entry[7] & 0b1100_0000 != 0))
    }

    /// How many pages of the range are the process's own, and no file's (bit 61), be they present or swapped out.
    fn pages_of_its_own(&self, host: u64, len: u64) -> io::Result<u64> {
        let mut pages = 0;
        let mut entries = vec![0u8; 64 << 10];
        let (mut at, end) = (host / PAGE_SIZE * 8, (host + len) / PAGE_SIZE * 8);
        while at < end {
            let part = &mut entries[..(end - at).min(64 << 10) as usize];
            self.pagemap()?.read_exact_at(part, at)?;
            let own = |entry: &&[u8]| entry[7] & 0b1100_0000 != 0 && entry[7] & 0b0010_0000 == 0;
            pages += part.chunks_exact(8).filter(own).count() as u64;
            at += part.len() as u64;
        }
        Ok(pages)
    }

    fn read(&self, host: u64, buf: &mut [u8]) -> io::Result<()> {
        self.mem.read_exact_at(buf, host).map_err(|_| io::Error::other(SHORTENED))
    }
}

fn memfd(bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal; the call has no other preconditions.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the fd was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

fn map(file: &Arc<File>, range: FileRange, sharing: i32) -> Result<GuestRegionMmap, RamError> {
    let fail = |reason: String| RamError::Map { gpa: range.gpa, bytes: range.len, reason };
    let region = MmapRegionBuilder::new(range.len as usize)
        .with_file_offset(FileOffset::from_arc(file.clone(), range.offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| fail(e.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(range.gpa)).ok_or_else(|| fail("address overflow".into()))
}

fn collect(regions: Vec<GuestRegionMmap>) -> Result<GuestMemoryMmap, RamError> {
    GuestMemoryMmap::from_regions(regions).map_err(|e| RamError::Map {
        gpa: 0,
        bytes: 0,
        reason: e.to_string(),
    })
}

/// Whether the file has anything but a hole in the range (`lseek(2)`, `SEEK_DATA`). Past its end there is no hole, though
/// `lseek` answers alike: bytes are missing.
fn holds_data(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    // SAFETY: the fd is open; the call moves only its offset, which nothing here uses.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, libc::SEEK_DATA) };
    if found >= 0 {
        return Ok((found as u64) < offset + len);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
        _ if file.metadata()?.len() < offset + len => Err(io::Error::other(SHORTENED)),
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_guest_has_touched_only_what_was_written() {
        let ram = GuestRam::new(8 << 20).unwrap();
        ram.memory().write_slice(b"here", GuestAddress(5 << 20)).unwrap();
        let mut chunk = vec![0; 1 << 20];
        assert!(!ram.read_touched(0, &mut chunk).unwrap());
        assert!(ram.read_touched(5 << 20, &mut chunk).unwrap());
        assert_eq!(&chunk[..4], b"here");
    }

    #[test]
    fn a_restored_guest_reads_the_file_and_never_writes_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(b"saved", 1 << 20).unwrap();
        let range = FileRange { gpa: 0, len: 4 << 20, offset: 0 };
        let ram = GuestRam::from_snapshot(file.try_clone().unwrap(), &[range]).unwrap();
        ram.memory().write_slice(b"later", GuestAddress(3 << 20)).unwrap();
        let mut chunk = vec![0; 1 << 20];
        assert!(!ram.read_touched(0, &mut chunk).unwrap());
        assert!(ram.read_touched(1 << 20, &mut chunk).unwrap());
        assert_eq!(&chunk[..5], b"saved");
        assert!(ram.read_touched(3 << 20, &mut chunk).unwrap());
        assert_eq!(&chunk[..5], b"later");
        let mut on_disk = [0; 5];
        file.read_exact_at(&mut on_disk, 3 << 20).unwrap();
        assert_eq!(on_disk, [0; 5]);
    }

    #[test]
    fn a_snapshot_that_is_shortened_in_use_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4 << 20], 0).unwrap();
        let range = FileRange { gpa: 0, len: 4 << 20, offset: 0 };
        let ram = GuestRam::from_snapshot(file.try_clone().unwrap(), &[range]).unwrap();
        let mut chunk = vec![0; 1 << 20];
        file.set_len((1 << 20) + 4096).unwrap();
        assert!(ram.read_touched(0, &mut chunk).unwrap());
        assert!(ram.read_touched(1 << 20, &mut chunk).is_err());
        assert!(ram.read_touched(2 << 20, &mut chunk).is_err(), "lost bytes are not zeroes");
    }

    #[test]
    fn ram_goes_on_after_the_hole() {
        let ram = GuestRam::new(5 << 30).unwrap();
        assert!(ram.memory().address_in_range(GuestAddress((4 << 30) + (2 << 30) - 1)));
        assert!(!ram.memory().address_in_range(GuestAddress(0xc000_0000)));
    }
}
