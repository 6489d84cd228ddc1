//! Guest RAM: where a guest's bytes live in this process.
//!
//! In: a memory size, or an open snapshot and where in it each range lies. Out: mapped guest memory, and for a capture,
//! which chunks were never touched. Holds: all of it is private, so that a copy of the process keeps it as it was ([`crate::frozen`]); a
//! restored guest's is a mapping of its snapshot, so that the file never changes and clones share its pages.

mod changes;
mod fetch;
mod fresh;
mod layers;
mod origin;
mod page_map;
mod page_scan;

use crate::layout::{PAGE_SIZE, ram_ranges};
use crate::lost_ram::{self, Gone, Watch};
use changes::Changes;
pub use changes::{ChangesError, Epoch};
use devices::{Marks, Memory, MemoryRegion};
pub(crate) use fresh::fresh;
use layers::Mapped;
pub use layers::{Layer, MAPPED_MAX};
use page_map::PageMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
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
    /// The memory of a copy of this process could not be opened.
    #[error("cannot open {path}, by which guest RAM is looked at")]
    CopiedMemory {
        /// `pagemap` or `mem`.
        path: String,
        /// What the host said.
        source: io::Error,
    },
}

/// Why RAM that is mapped from a file can't be read or written.
const SHORTENED: &str = "the file that it is mapped from was shortened meanwhile";
/// Why frozen RAM can't be read.
pub(crate) const GONE: &str =
    "the copy of this process that has it as it was is gone: the host may be short of memory";

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

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
    memory: Memory,
    windows: Vec<Window>,
    pages: Arc<PageMap>,
    kind: Kind,
    watches: Vec<Arc<Watch>>,
    /// What is mapped from other files than the first, in order.
    layers: Arc<Vec<Mapped>>,
    changes: Arc<Changes>,
}

/// What guest RAM is.
#[derive(Clone, Debug)]
enum Kind {
    /// Memory of this process.
    Fresh,
    /// A snapshot, mapped privately.
    Mapped,
    /// Either of them, as a child of this process has it, whose memory this is.
    Frozen(Arc<File>),
}

/// Memory that a guest may read beside its RAM: no part of a snapshot, and out of its devices' reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// Guest physical address at which address 0 of the memory is seen.
    pub base: u64,
    /// What is seen.
    pub memory: Memory,
}

/// Writes guest RAM, wherever that is.
#[derive(Clone, Debug)]
pub struct RamWriter {
    memory: Memory,
    is_mapped: bool,
}

impl RamWriter {
    /// Writes `bytes` at a guest physical address.
    ///
    /// # Errors
    /// There is no RAM, or the snapshot that it is mapped from has lost this part of it.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.is_mapped {
            return self.memory.write_slice(bytes, GuestAddress(gpa)).map_err(io::Error::other);
        }
        let target = self.memory.get_slice(GuestAddress(gpa), bytes.len()).map_err(io::Error::other)?;
        // SAFETY: the slice is in RAM's mapping, which can be written and to which nobody has a reference.
        let written = unsafe { lost_ram::write(target.ptr_guard_mut().as_ptr() as u64, bytes) };
        target.bitmap().mark_dirty(0, bytes.len());
        written.map_err(|Gone| io::Error::other(SHORTENED))
    }
}

impl GuestRam {
    /// Zeroed RAM of `bytes`. Pages cost nothing until touched.
    ///
    /// # Errors
    /// When the host will not give so much address space.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        let regions = ram_ranges(bytes).into_iter().map(|(gpa, len)| fresh(gpa, len));
        let memory = collect(regions.collect::<Result<_, _>>()?)?;
        Ok(Self::of(memory, Kind::Fresh))
    }

    /// Memory from address 0 on with these bytes, whole pages.
    ///
    /// # Errors
    /// When the host will not give so much.
    pub fn of_bytes(bytes: &[u8]) -> Result<Self, RamError> {
        let region = fresh(0, bytes.len() as u64)?;
        let failed = |reason: GuestMemoryError| unmapped(0, bytes.len() as u64, reason);
        let memory = collect(vec![region])?;
        memory.write_slice(bytes, GuestAddress(0)).map_err(failed)?;
        Ok(Self::of(memory, Kind::Fresh))
    }

    fn of(memory: Memory, kind: Kind) -> Self {
        let (pages, layers, changes) = (Arc::default(), Arc::default(), Arc::default());
        Self { memory, windows: Vec::new(), pages, kind, watches: Vec::new(), layers, changes }
    }

    /// RAM whose bytes are a snapshot's, mapped privately: what the guest writes never reaches the file.
    ///
    /// # Errors
    /// When a range can't be mapped.
    pub fn from_snapshot(file: File, ranges: &[FileRange]) -> Result<Self, RamError> {
        let file = Arc::new(file);
        let regions = ranges.iter().map(|range| map(&file, *range)).collect::<Result<_, _>>()?;
        Ok(Self::of(collect(regions)?, Kind::Mapped))
    }

    /// The same, and if the snapshot at `path`, which it is mapped from, is shortened, that is told; see [`lost_ram`].
    pub fn watched(mut self, path: &Path) -> Self {
        let ends = self.memory.iter().filter_map(|region| Some((region.file_offset()?, region.len())));
        let end = ends.map(|(behind, len)| behind.start() + len).max();
        let file = self.memory.iter().find_map(|region| Some(region.file_offset()?.arc().clone()));
        let place = |region: &MemoryRegion| {
            let start = region.as_ptr() as usize;
            start..start + region.len() as usize
        };
        let ranges = self.memory.iter().map(place).collect();
        let watch = file.zip(end).map(|(file, end)| lost_ram::watch(path, &file, ranges, end));
        self.watches.extend(watch.map(Arc::new));
        self
    }

    /// Does `copy` while a copy of this process would have this RAM too.
    pub(crate) fn while_copied<T>(&self, copy: impl FnOnce() -> T) -> T {
        self.memory.iter().for_each(|region| advise(region, libc::MADV_DOFORK));
        let made = copy();
        self.forbid_copies();
        made
    }

    /// What copies the process has no need of a guest's RAM, unless it says so.
    fn forbid_copies(&self) {
        self.memory.iter().for_each(|region| advise(region, libc::MADV_DONTFORK));
    }

    /// The same RAM as that child of this process has it, which it got by [`GuestRam::while_copied`]. It can be read only.
    ///
    /// # Errors
    /// The child's memory can't be looked at.
    pub(crate) fn as_in(&self, child: i32) -> Result<Self, RamError> {
        let pages = PageMap::of(open_memory(child, "pagemap")?).into();
        Ok(Self { pages, kind: Kind::Frozen(open_memory(child, "mem")?.into()), ..self.clone() })
    }

    /// Has the host put small pages together to huge ones again, where most of a huge one is there, as long as `go_on` says so. The next copy of the
    /// process costs the less. The guest may run; a host that can't do it does nothing.
    pub(crate) fn rejoin(&self, go_on: &dyn Fn() -> bool) {
        for region in self.memory.iter().filter(|region| region.file_offset().is_none()) {
            let (start, len) = (region.as_ptr() as u64, region.len());
            let blocks = (start.next_multiple_of(HUGE_PAGE)..start + len).step_by(HUGE_PAGE as usize);
            for block in blocks.filter(|block| block + HUGE_PAGE <= start + len).take_while(|_| go_on()) {
                let pages = self.pages.pages_of_its_own(block, HUGE_PAGE).unwrap_or(0);
                if pages * PAGE_SIZE >= HUGE_PAGE / 2 {
                    // SAFETY: the block lies in the region's mapping, and what is in it stays the same.
                    unsafe { libc::madvise(block as *mut _, HUGE_PAGE as usize, libc::MADV_COLLAPSE) };
                }
            }
        }
    }

    /// Where in this process a range of it is.
    pub(crate) fn host_address(&self, gpa: u64, len: u64) -> Option<u64> {
        let slice = self.memory.get_slice(GuestAddress(gpa), len as usize).ok()?;
        Some(slice.ptr_guard().as_ptr() as u64)
    }

    /// Why a part of it is lost, if it is.
    pub fn lost(&self) -> Option<&'static str> {
        self.watches.iter().find_map(|watch| watch.why())
    }

    /// The mapped memory.
    pub fn memory(&self) -> &Memory {
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

    /// A way to write guest memory for those who don't own it.
    pub fn writer(&self) -> RamWriter {
        RamWriter { memory: self.memory.clone(), is_mapped: self.is_mapped() }
    }

    /// Whether it is a snapshot, mapped.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.kind, Kind::Mapped)
    }

    /// How many pages of it this process has, be they its own or a file's.
    ///
    /// # Errors
    /// The host won't say.
    pub(crate) fn pages_here(&self) -> io::Result<u64> {
        let mut pages = 0;
        self.memory.iter().try_for_each(|region| {
            self.pages.each_page(region.as_ptr() as u64, region.len(), |_| pages += 1)
        })?;
        Ok(pages)
    }

    /// Bytes of the host's memory that this RAM takes for itself: what a snapshot's mapping shares with the file is not
    /// counted. Zero where the host won't say.
    pub fn resident_bytes(&self) -> u64 {
        let own = |region: &MemoryRegion| self.pages.pages_of_its_own(region.as_ptr() as u64, region.len());
        self.memory.iter().map(|region| own(region).unwrap_or(0) * PAGE_SIZE).sum()
    }

    /// Reads guest bytes; `false`, with nothing read, when they are surely all zero because they were never touched.
    ///
    /// # Errors
    /// An address outside RAM, a host that won't say what was touched, or a snapshot that lost its end while in use.
    pub fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        let (region, start) = self.memory.to_region_addr(GuestAddress(gpa)).ok_or_else(|| outside(gpa))?;
        let (host, len) = (region.as_ptr() as u64 + start.0, buf.len() as u64);
        if !self.origin_has_data(gpa, len)? && !self.pages.has_pages(host, len)? {
            return Ok(false);
        }
        self.read(gpa, buf).map(|()| true)
    }

    /// Reads guest bytes.
    ///
    /// # Errors
    /// An address outside RAM, or a snapshot that lost its end while in use.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        let host = self.host_address(gpa, buf.len() as u64).ok_or_else(|| outside(gpa))?;
        match &self.kind {
            Kind::Fresh => self.memory.read_slice(buf, GuestAddress(gpa)).map_err(io::Error::other),
            Kind::Mapped => {
                // SAFETY: a range of RAM, which is mapped for as long as this value lives, and to which nobody has a reference.
                unsafe { lost_ram::read(host, buf) }.map_err(|Gone| io::Error::other(SHORTENED))
            }
            Kind::Frozen(memory) => memory.read_exact_at(buf, host).map_err(|_| io::Error::other(GONE)),
        }
    }
}

fn open_memory(child: i32, file: &str) -> Result<File, RamError> {
    let path = format!("/proc/{child}/{file}");
    File::open(&path).map_err(|source| RamError::CopiedMemory { path, source })
}

pub(crate) fn outside(gpa: u64) -> io::Error {
    io::Error::other(format!("no guest RAM at {gpa:#x}"))
}

fn map(file: &Arc<File>, range: FileRange) -> Result<MemoryRegion, RamError> {
    let behind = FileOffset::from_arc(file.clone(), range.offset);
    let builder = builder(range.len).with_file_offset(behind);
    region(builder, libc::MAP_PRIVATE | libc::MAP_NORESERVE, range.gpa, range.len)
}

/// Memory whose pages can be marked.
fn builder(len: u64) -> MmapRegionBuilder<Marks> {
    MmapRegionBuilder::new_with_bitmap(len as usize, Marks::with_len(len as usize))
}

fn region(
    builder: MmapRegionBuilder<Marks>,
    flags: i32,
    gpa: u64,
    len: u64,
) -> Result<MemoryRegion, RamError> {
    let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
    let region = builder.build().map_err(|error| unmapped(gpa, len, error))?;
    let region = MemoryRegion::new(region, GuestAddress(gpa));
    let region = region.ok_or_else(|| unmapped(gpa, len, "address overflow"))?;
    advise(&region, libc::MADV_DONTFORK);
    Ok(region)
}

/// A host that knows no such advice does without.
fn advise(region: &MemoryRegion, advice: i32) {
    // SAFETY: the range is the region's mapping; none of the advice given here changes what is in it.
    unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
}

fn unmapped(gpa: u64, bytes: u64, reason: impl ToString) -> RamError {
    RamError::Map { gpa, bytes, reason: reason.to_string() }
}

fn collect(regions: Vec<MemoryRegion>) -> Result<Memory, RamError> {
    Memory::from_regions(regions).map_err(|error| unmapped(0, 0, error))
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

/// RAM that is mapped from a file with nothing but this byte, and the file.
#[cfg(test)]
pub(crate) fn of_file(byte: u8, len: u64) -> (File, GuestRam) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![byte; len as usize], 0).unwrap();
    let range = FileRange { gpa: 0, len, offset: 0 };
    let ram = GuestRam::from_snapshot(file.try_clone().unwrap(), &[range]).unwrap();
    (file, ram)
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
        let (file, ram) = of_file(1, 4 << 20);
        let mut chunk = vec![0; 1 << 20];
        file.set_len((1 << 20) + 4096).unwrap();
        assert!(ram.read_touched(0, &mut chunk).unwrap());
        assert!(ram.read_touched(1 << 20, &mut chunk).is_err());
        assert!(ram.read_touched(2 << 20, &mut chunk).is_err(), "lost bytes are not zeroes");
    }

    #[test]
    fn so_it_is_where_ram_is_looked_after() {
        let (file, ram) = of_file(1, 4 << 20);
        let ram = ram.watched(Path::new("looked-after"));
        ram.memory().write_slice(&[2; 8192], GuestAddress(2 << 20)).unwrap();
        let mut chunk = vec![0; 1 << 20];
        ram.read(2 << 20, &mut chunk[..8192]).unwrap();
        assert_eq!(chunk[..8192], [2; 8192]);
        file.set_len((1 << 20) + 4096).unwrap();
        ram.read(0, &mut chunk).unwrap();
        assert!(chunk.iter().all(|byte| *byte == 1));
        // What the guest has written there is lost as well.
        for (gpa, len) in [((1 << 20) + 4096, 1 << 20), (2 << 20, 8192), (2 << 20, 12), (2 << 20, 3)] {
            assert!(ram.read(gpa, &mut chunk[..len]).is_err(), "{len} bytes at {gpa:#x}");
            assert!(ram.writer().write(gpa, &chunk[..len]).is_err(), "{len} bytes to {gpa:#x}");
        }
        ram.writer().write(5, b"still here").unwrap();
        ram.read(3, &mut chunk[..13]).unwrap();
        assert_eq!(&chunk[..13], b"\x01\x01still here\x01");
    }

    #[test]
    fn ram_goes_on_after_the_hole() {
        let ram = GuestRam::new(5 << 30).unwrap();
        assert!(ram.memory().address_in_range(GuestAddress((4 << 30) + (2 << 30) - 1)));
        assert!(!ram.memory().address_in_range(GuestAddress(0xc000_0000)));
    }
}
