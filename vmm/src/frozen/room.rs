//! Room for a copy of guest RAM, in a child of this process.
//!
//! In: pages, while the guest runs. Out: RAM as of the instant at which the last of them was put. Holds: a page that was never put is as the
//! snapshot has it that RAM is mapped from, or zero where that was given up.

use super::{Child, FreezeError, FrozenRam};
use crate::layout::PAGE_SIZE;
use crate::ram::{GONE, GuestRam, outside};
use snapshot::PageSet;
use std::io;
use std::ops::Range;

/// Most pieces of memory that one call copies (`UIO_MAXIOV`).
const PIECES: usize = 1024;
/// Most bytes of a piece, and of a call. Linux copies less than 2 GiB at once, and whoever gives up should not have to wait.
const PIECE: u64 = 8 << 20;
const CALL: u64 = 64 << 20;

/// A child that has as much memory as a guest, and nothing in it.
#[derive(Debug)]
pub(crate) struct Room {
    of: GuestRam,
    copies: GuestRam,
    child: Child,
    have: PageSet,
}

impl Room {
    /// For this RAM. The child ends with the thread that calls this.
    ///
    /// # Errors
    /// The host has no room for another process, or won't let this one look into it.
    pub(crate) fn of(ram: &GuestRam) -> Result<Self, FreezeError> {
        let empty = ram.empty_one()?;
        let child = empty.while_copied(Child::new).map_err(FreezeError::Copy)?;
        let copies = empty.as_in(child.id)?;
        let room = Self { of: ram.clone(), copies, child, have: PageSet::none_of(ram.page_count()) };
        room.child.yield_first();
        Ok(room)
    }

    /// Copies these pages as they are now, also again. Once `go_on` says no some of them may be missing, and the room is of no use.
    ///
    /// # Errors
    /// The child is gone, or the snapshot that RAM is mapped from has lost some of them.
    pub(crate) fn put(&mut self, pages: &PageSet, go_on: &dyn Fn() -> bool) -> io::Result<()> {
        let mut pieces = Pieces::default();
        let cut = |(gpa, len): (u64, u64)| {
            (0..len).step_by(PIECE as usize).map(move |at| (gpa + at, PIECE.min(len - at)))
        };
        for (gpa, len) in self.of.runs(pages).flat_map(cut).take_while(|_| go_on()) {
            let places = self.of.host_address(gpa, len).zip(self.copies.host_address(gpa, len));
            pieces.add(places.ok_or_else(|| outside(gpa))?, len);
            if pieces.from.len() == PIECES || pieces.bytes >= CALL {
                pieces.copy(self.child.id)?;
            }
        }
        pieces.copy(self.child.id)?;
        self.have.insert_all(pages);
        Ok(())
    }

    /// RAM as it is now. Nobody may have written to it since the last pages were put.
    pub(crate) fn freeze(self) -> FrozenRam {
        let zero = self.of.dropped();
        let rest = Rest { running: self.of, have: self.have, zero };
        FrozenRam { ram: self.copies, child: self.child, rest: Some(rest) }
    }
}

/// What is to be copied by one call.
#[derive(Default)]
struct Pieces {
    from: Vec<libc::iovec>,
    to: Vec<libc::iovec>,
    bytes: u64,
}

impl Pieces {
    fn add(&mut self, (from, to): (u64, u64), len: u64) {
        let piece = |address| libc::iovec { iov_base: address as *mut _, iov_len: len as usize };
        self.from.push(piece(from));
        self.to.push(piece(to));
        self.bytes += len;
    }

    fn copy(&mut self, child: i32) -> io::Result<()> {
        let (from, to, count) = (self.from.as_ptr(), self.to.as_ptr(), self.from.len() as u64);
        // SAFETY: the pieces are parts of guest RAM here, which is read, and of the child's memory, in which nothing of it runs; the kernel
        // answers EFAULT where a page can't be had.
        let copied = unsafe { libc::process_vm_writev(child, from, count, to, count, 0) };
        if count > 0 && u64::try_from(copied).ok() != Some(self.bytes) {
            return Err(io::Error::other(GONE));
        }
        *self = Self::default();
        Ok(())
    }
}

/// What is not in the child.
#[derive(Debug)]
pub(super) struct Rest {
    running: GuestRam,
    have: PageSet,
    /// Shows nothing of the snapshot any more.
    zero: Option<PageSet>,
}

impl Rest {
    /// As [`GuestRam::read_touched`].
    pub(super) fn read_touched(&self, copies: &GuestRam, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        let pages = self.pages(gpa, buf.len())?;
        let copied = self.have.runs(pages).next().is_some();
        if !copied && !self.running.origin_has_data(gpa, buf.len() as u64)? {
            return Ok(false);
        }
        self.read(copies, gpa, buf).map(|()| true)
    }

    /// As [`GuestRam::read`].
    pub(super) fn read(&self, copies: &GuestRam, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        let pages = self.pages(gpa, buf.len())?;
        let place = |run: &Range<u64>| {
            let [start, end] = [run.start, run.end].map(|page| (page - pages.start) * PAGE_SIZE);
            start as usize..end as usize
        };
        if self.have.runs(pages.clone()).next() != Some(pages.clone()) {
            self.running.read_origin(gpa, buf)?;
            let zero = self.zero.iter().flat_map(|zero| zero.runs(pages.clone()));
            zero.for_each(|run| buf[place(&run)].fill(0));
        }
        self.have.runs(pages.clone()).try_for_each(|run| {
            let at = place(&run);
            copies.read(gpa + at.start as u64, &mut buf[at])
        })
    }

    /// The pages that are not as the snapshot has them.
    pub(super) fn changed(&self) -> PageSet {
        let mut changed = self.have.clone();
        self.zero.iter().for_each(|zero| changed.insert_all(zero));
        changed
    }

    /// The RAM that goes on.
    pub(super) fn running(&self) -> &GuestRam {
        &self.running
    }

    /// Whole pages, of which somebody asks for the bytes.
    fn pages(&self, gpa: u64, len: usize) -> io::Result<Range<u64>> {
        let first = self.running.page_number(gpa).filter(|_| gpa.is_multiple_of(PAGE_SIZE));
        let first = first.ok_or_else(|| io::Error::other(format!("no page of guest RAM at {gpa:#x}")))?;
        Ok(first..first + (len as u64).div_ceil(PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discard::RamDiscard;
    use crate::ram::{FileRange, Layer};
    use devices::virtio::{Discard, Segment};
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1 << 20;

    /// Two ranges of 8 MiB; a MiB of data in each of the first two, a hole behind; one page lies over it from another file.
    fn ram() -> GuestRam {
        let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        first.set_len(16 * MIB).unwrap();
        first.write_all_at(&[7; 3 << 20], 0).unwrap();
        second.write_all_at(&[8; 8192], 0).unwrap();
        let ranges =
            [(0, 0), (1 << 32, 8 * MIB)].map(|(gpa, offset)| FileRange { gpa, len: 8 * MIB, offset });
        let (file, path) = (Arc::new(second), Path::new("second"));
        let layer = Layer { file: &file, path, gpa: 7 * MIB, len: 4096, offset: 4096 };
        GuestRam::from_snapshot(first, &ranges).unwrap().with_layers(&[layer]).unwrap()
    }

    fn pages(numbers: &[u64]) -> PageSet {
        let mut set = PageSet::none_of(4096);
        numbers.iter().for_each(|page| set.insert(*page..page + 1));
        set
    }

    fn bytes(frozen: &FrozenRam, gpas: &[u64]) -> Vec<Option<u8>> {
        let mut page = vec![0; 4096];
        gpas.iter().map(|gpa| frozen.read_touched(*gpa, &mut page).unwrap().then(|| page[4095])).collect()
    }

    #[test]
    fn it_is_as_of_the_instant_wherever_the_pages_are() {
        let ram = ram();
        ram.memory().write_slice(&[1; 8192], GuestAddress(0x4000)).unwrap();
        RamDiscard::new(&ram).discard(Segment { address: 2 * MIB, len: 2 << 20 });
        let mut room = Room::of(&ram).unwrap();
        room.put(&pages(&[4, 5]), &|| true).unwrap();
        ram.memory().write_slice(&[2; 4096], GuestAddress(0x5000)).unwrap();
        ram.memory().write_slice(&[3; 4096], GuestAddress((1 << 32) + 0x1000)).unwrap();
        room.put(&pages(&[5, 2049]), &|| true).unwrap();
        let frozen = room.freeze();
        let all = [0x3000, 0x4000, 0x5000, 2 * MIB, 5 * MIB, 7 * MIB, 1 << 32, (1 << 32) + 0x1000];
        for gpa in all {
            ram.memory().write_slice(&[9; 4096], GuestAddress(gpa)).unwrap();
        }
        let found = bytes(&frozen, &all);
        assert_eq!(found, [Some(7), Some(1), Some(2), Some(0), None, Some(8), None, Some(3)]);
        let mut chunk = vec![0; 1 << 20];
        frozen.read(0, &mut chunk).unwrap();
        let places = [0x3fff, 0x4000, 0x5fff, 0x6000];
        assert_eq!(places.map(|at| chunk[at]), [7, 1, 2, 7]);
        frozen.check(&|| Ok(())).unwrap();
    }

    #[test]
    fn a_child_that_is_gone_is_an_error() {
        let ram = ram();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        let mut room = Room::of(&ram).unwrap();
        // SAFETY: the child has not been waited for.
        unsafe { libc::kill(room.child.id, libc::SIGKILL) };
        let gone = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            room.put(&pages(&[0]), &|| true).is_err()
        });
        assert!(gone);
    }

    /// Else its bytes would be the file's that it is mapped from now.
    #[test]
    fn ram_that_was_shortened_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4 << 20], 0).unwrap();
        let range = FileRange { gpa: 0, len: 4 * MIB, offset: 0 };
        let ram = GuestRam::from_snapshot(file.try_clone().unwrap(), &[range]).unwrap();
        let mut room = Room::of(&ram).unwrap();
        file.set_len(MIB).unwrap();
        assert!(room.put(&PageSet::none_of(1024), &|| true).is_ok());
        let mut set = PageSet::none_of(1024);
        set.insert(512..513);
        assert!(room.put(&set, &|| true).is_err());
        let frozen = room.freeze();
        assert!(frozen.read(2 * MIB, &mut [0; 4096]).is_err());
    }
}
