//! Guest memory that knows what was written to it.
//!
//! In: writes by devices and the monitor. Out: which pages they wrote, to whoever wants to know. Holds: while nobody does, no
//! memory is taken; a page is marked after it was written, so that whoever takes the marks and then reads misses nothing for good.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

/// A guest's memory.
pub type Memory = GuestMemoryMmap<Marks>;
/// One range of it.
pub type MemoryRegion = GuestRegionMmap<Marks>;

/// Bytes that one mark stands for.
const PAGE: usize = 4096;
const BITS: usize = u64::BITS as usize;

/// Which pages of a range were written by this process since somebody asked.
#[derive(Debug, Default)]
pub struct Marks {
    bytes: usize,
    wanted: AtomicBool,
    /// Made when they are wanted first: a machine that starts does not wait for them.
    words: OnceLock<Box<[AtomicU64]>>,
}

/// The marks of a range.
pub fn marks(region: &MemoryRegion) -> &Marks {
    (**region).bitmap()
}

impl Marks {
    /// From now on pages are marked.
    pub fn start(&self) {
        self.take();
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// From now on they are not.
    pub fn stop(&self) {
        self.wanted.store(false, Ordering::SeqCst);
    }

    /// The pages that were marked since the last time: a bit for each, the lowest of a word first.
    pub fn take(&self) -> Vec<u64> {
        self.words().iter().map(|word| word.swap(0, Ordering::SeqCst)).collect()
    }

    fn words(&self) -> &[AtomicU64] {
        let count = self.bytes.div_ceil(PAGE).div_ceil(BITS);
        self.words.get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl NewBitmap for Marks {
    fn with_len(len: usize) -> Self {
        Self { bytes: len, ..Self::default() }
    }
}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // Whoever wants marks from now on, and does not get this one, finds in memory what was written before it.
        fence(Ordering::SeqCst);
        if !self.wanted.load(Ordering::SeqCst) || offset >= self.bytes || len == 0 {
            return;
        }
        let last = offset.saturating_add(len - 1).min(self.bytes - 1) / PAGE;
        let words = self.words();
        (offset / PAGE..=last).for_each(|page| {
            words[page / BITS].fetch_or(1 << (page % BITS), Ordering::SeqCst);
        });
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let word = self.words().get(offset / PAGE / BITS);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (offset / PAGE % BITS) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

    const RANGES: [(GuestAddress, usize); 2] =
        [(GuestAddress(0), 0x10_0000), (GuestAddress(1 << 32), 0x10_0000)];

    fn marked(memory: &Memory) -> Vec<usize> {
        let pages = |words: Vec<u64>| {
            (0..words.len() * BITS).filter(move |page| words[page / BITS] >> (page % BITS) & 1 == 1)
        };
        memory.iter().flat_map(|region| pages(marks(region).take())).collect()
    }

    #[test]
    fn each_kind_of_write_is_marked_and_no_reading() {
        let memory = Memory::from_ranges(&RANGES).unwrap();
        memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
        memory.iter().for_each(|region| marks(region).start());
        assert!(marked(&memory).is_empty());
        memory.write_slice(&[1; 0x1001], GuestAddress(0x1fff)).unwrap();
        memory.write_obj(1u16, GuestAddress((1 << 32) + 0xff_fff - 1)).unwrap();
        memory.store(1u32, GuestAddress(0x9000), Ordering::SeqCst).unwrap();
        let mut source = &[7u8; 0x2000][..];
        let mut slice = memory.get_slice(GuestAddress(0x20_800), 0x1000).unwrap();
        source.read_volatile(&mut slice).unwrap();
        let _: u64 = memory.read_obj(GuestAddress(0x40_000)).unwrap();
        assert_eq!(marked(&memory), [1, 2, 9, 0x20, 0x21, 0xff]);
        assert!(marked(&memory).is_empty());
        memory.iter().for_each(|region| marks(region).stop());
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(marked(&memory).is_empty());
    }

    #[test]
    fn what_is_beyond_the_end_is_nobodys() {
        let marks = Marks::with_len(0x3000);
        marks.start();
        marks.mark_dirty(0x2000, usize::MAX);
        marks.mark_dirty(0x3000, 1);
        marks.mark_dirty(0, 0);
        assert_eq!(marks.take(), [0b100]);
        assert!(!marks.dirty_at(0x2000));
    }
}
