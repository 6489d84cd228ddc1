//! `/proc/vmcore`, mapped.
//!
//! In: the file. Out: its headers and notes, checked, and chunks of its RAM. Holds: RAM is read through mappings of its pages, since
//! for read(2) the kernel maps and unmaps each page by itself; what the chunk table has as zero is not touched, which costs the host
//! nothing then; all else has the digest that the table says.

use snapshot_format::chunk::{self, Digest};
use snapshot_format::{CHUNK_SIZE, Fault, Image, Layout, MappedRange, Notes, PAGE_SIZE, RamRange};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

const PATH: &str = "/proc/vmcore";

/// The file.
pub(crate) struct Vmcore {
    file: File,
    layout: Layout,
    head: Mapping,
}

/// Part of it.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Vmcore {
    /// Opens it and checks all of it but RAM.
    pub(crate) fn open() -> io::Result<Self> {
        let file = File::open(PATH)?;
        let len = file.metadata()?.len();
        let layout = snapshot_format::image::layout(&Mapping::of(&file, 0, PAGE_SIZE)?, len).map_err(told)?;
        let head = Mapping::of(&file, 0, layout.ram_start())?;
        let notes = Notes::find(&head, &layout).map_err(told)?;
        let layout = Image::new(layout, notes).map_err(told)?.layout;
        Ok(Self { file, layout, head })
    }

    /// All before RAM.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Bytes of the file.
    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Hands over each chunk of RAM that is not all zero, with its place in the file; returns the digest of the digests of all chunks,
    /// in the order of guest addresses.
    pub(crate) fn each_chunk(&self, mut take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<u64> {
        let notes = Notes::find(&self.head, &self.layout).map_err(told)?;
        let mut table = chunk::digests(notes.table);
        let mut all = Digest::default();
        let zero = chunk::zero_digest(CHUNK_SIZE);
        for mapped in self.layout.ram() {
            for chunk in chunk::chunks(&[mapped.range]) {
                let expected = table.next().unwrap_or_default();
                if chunk.len != CHUNK_SIZE || expected != zero {
                    self.chunk(mapped, chunk, expected, &mut take)?;
                }
                all.update(&expected.to_le_bytes());
            }
        }
        Ok(all.value())
    }

    fn chunk(
        &self,
        mapped: &MappedRange,
        RamRange { gpa, len }: RamRange,
        expected: u64,
        take: &mut impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let offset = mapped.offset + (gpa - mapped.range.gpa);
        let bytes = Mapping::of(&self.file, offset, len)?;
        let found = chunk::digest(&bytes);
        if found != expected {
            return Err(told(Fault::Digest { gpa, len, found, expected }));
        }
        take(offset, &bytes)
    }
}

impl Mapping {
    /// Whole pages.
    fn of(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let len = len as usize;
        // SAFETY: a new mapping in a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                offset as i64,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, readable, of that length; the machine whose memory it is sleeps.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody borrows it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn told(fault: Fault) -> io::Error {
    io::Error::other(format!("{PATH}: {fault}"))
}
