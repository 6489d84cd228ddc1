//! Guest RAM: where a guest's bytes live in this process.
//!
//! In: a memory size, or an open snapshot and where in it each range lies. Out: mapped guest memory, and for a capture,
//! which chunks were never touched. Holds: all of it is private, so that a copy of the process keeps it as it was ([`crate::frozen`]); a
//! restored guest's is a mapping of its snapshot, so that the file never changes and clones share its pages.

mod bytes;
mod changes;
mod fetch;
mod fresh;
mod layers;
mod origin;
mod page_map;
mod page_scan;

use crate::layout::{PAGE_SIZE, ram_ranges};
use crate::lost_ram::{self, Watch};
pub use bytes::RamWriter;
use bytes::shortened;
pub(crate) use bytes::{GONE, outside};
use changes::Changes;
pub use changes::{ChangesError, Epoch};
use devices::{Marks, Memory, MemoryRegion};
pub(crate) use fresh::fresh;
use layers::Mapped;
pub use layers::{Layer, MAPPED_MAX};
use page_map::PageMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use vm_memory::bitmap::NewBitmap;
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
}

fn open_memory(child: i32, file: &str) -> Result<File, RamError> {
    let path = format!("/proc/{child}/{file}");
    File::open(&path).map_err(|source| RamError::CopiedMemory { path, source })
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

/// RAM that is mapped from a file with nothing but this byte, and the file.
#[cfg(test)]
pub(crate) fn of_file(byte: u8, len: u64) -> (File, GuestRam) {
    use std::os::unix::fs::FileExt;

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
    fn ram_goes_on_after_the_hole() {
        let ram = GuestRam::new(5 << 30).unwrap();
        assert!(ram.memory().address_in_range(GuestAddress((4 << 30) + (2 << 30) - 1)));
        assert!(!ram.memory().address_in_range(GuestAddress(0xc000_0000)));
    }
}
