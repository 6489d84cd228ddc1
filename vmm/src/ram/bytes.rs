//! A guest's bytes, in and out, wherever its RAM is.
//!
//! In: guest addresses. Out: what is there, or that it is there now. Holds: what is gone is an error, where a load or store would be a SIGBUS:
//! whoever may write to a snapshot that RAM is mapped from can shorten it.

use super::{GuestRam, Kind};
use crate::lost_ram::{self, Gone};
use devices::Memory;
use std::io;
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Why frozen RAM can't be read.
pub(crate) const GONE: &str =
    "the copy of this process that has it as it was is gone: the host may be short of memory";

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
        written.map_err(|Gone| shortened())
    }
}

impl GuestRam {
    /// A way to write guest memory for those who don't own it.
    pub fn writer(&self) -> RamWriter {
        RamWriter { memory: self.memory.clone(), is_mapped: self.is_mapped() }
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
        let host = |len| self.host_address(gpa, len as u64).ok_or_else(|| outside(gpa));
        match &self.kind {
            Kind::Fresh => self.memory.read_slice(buf, GuestAddress(gpa)).map_err(io::Error::other),
            Kind::Mapped => {
                let host = host(buf.len())?;
                // SAFETY: a range of RAM, which is mapped for as long as this value lives, and to which nobody has a reference.
                unsafe { lost_ram::read(host, buf) }.map_err(|Gone| shortened())
            }
            Kind::Frozen(memory) => {
                let host = host(buf.len())?;
                memory.read_exact_at(buf, host).map_err(|_| io::Error::other(GONE))
            }
        }
    }
}

pub(crate) fn outside(gpa: u64) -> io::Error {
    io::Error::other(format!("no guest RAM at {gpa:#x}"))
}

/// Why RAM that is mapped from a file can't be read or written.
pub(super) fn shortened() -> io::Error {
    io::Error::other("the file that it is mapped from was shortened meanwhile, or cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{FileRange, of_file};
    use std::path::Path;

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
}
