//! The stub's memory and its page tables.
//!
//! In: ranges that the stub is to see, linear and physical. Out: its memory, with 4-level page tables in it. Holds: tables grow
//! only from absent to present, so a vCPU that has run needs not be told; room for them is taken once.

use super::StubError;
use crate::layout::PAGE_SIZE;
use crate::ram;
use devices::Memory;
use restore_stub::abi;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes behind one entry of the last level: a large page.
pub(super) const LARGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// How much further from a multiple of its size a part of the file is than its place in RAM. Were both alike, a page and its place would
/// take the same entry of a TLB that is direct-mapped, as QEMU's is.
const STAGGER: u64 = 33 * PAGE_SIZE;
/// Ranges that are mapped: the stub, the file, RAM below and above 4 GiB.
const RANGES: u64 = 4;

// SDM volume 3, 4.5 "4-level paging".
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const IS_LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Lowest bit of a linear address that chooses an entry, from the first level to the last.
const SHIFTS: [u32; 3] = [39, 30, 21];

/// A range that the stub sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) linear: u64,
    pub(super) gpa: u64,
    /// Bytes; rounded up to large pages, of which nobody uses the rest.
    pub(super) len: u64,
    pub(super) writable: bool,
}

/// Where everything is in guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The stub's memory; [`abi::BASE`] is there.
    pub(super) base: u64,
    /// Its bytes.
    pub(super) size: u64,
    /// The file.
    pub(super) image: u64,
    /// Linear address of the map of holes.
    pub(super) holes: u64,
    /// Linear address of room for [`abi::STAGED`] parts of the file.
    pub(super) staging: u64,
    /// One past the last address.
    pub(super) end: u64,
}

impl Plan {
    /// For a file of `len` bytes, of which RAM can't be longer.
    pub(super) fn new(len: u64, holes_len: u64) -> Self {
        // One for the first level; a range that isn't aligned takes two more of each than its length says.
        let levels = [GIB, 512 * GIB].map(|covered| 2 * (len / covered) + 2 * RANGES);
        let holes = abi::TABLES + (1 + levels.iter().sum::<u64>()) * PAGE_SIZE;
        let staging = (holes + holes_len).next_multiple_of(abi::STAGED_MAX) + STAGGER;
        let size = (staging + abi::STAGED * abi::STAGED_MAX - abi::BASE).next_multiple_of(LARGE);
        let base = (4 * GIB + len).next_multiple_of(GIB);
        let image = base + size;
        Self { base, size, image, holes, staging, end: image + len.next_multiple_of(LARGE) }
    }

    /// The guest physical address of a linear one in the stub's memory.
    fn gpa(&self, linear: u64) -> u64 {
        self.base + (linear - abi::BASE)
    }
}

/// The memory.
#[derive(Debug)]
pub(super) struct StubMemory {
    plan: Plan,
    memory: Memory,
    /// Linear address of the next free page for a table.
    next: u64,
}

impl StubMemory {
    /// With its descriptors, and an empty first level of page tables at [`StubMemory::root`].
    pub(super) fn new(plan: Plan, gdt: &[u64]) -> Result<Self, StubError> {
        let failed = |reason: String| StubError::Memory { bytes: plan.size, reason };
        let region = ram::fresh(plan.base, plan.size).map_err(|error| failed(error.to_string()))?;
        let memory = Memory::from_regions(vec![region]).map_err(|error| failed(error.to_string()))?;
        let own = Self { plan, memory, next: abi::TABLES + PAGE_SIZE };
        let gdt: Vec<u8> = gdt.iter().flat_map(|word| word.to_le_bytes()).collect();
        own.write(abi::GDT, &gdt)?;
        Ok(own)
    }

    /// Guest physical address of the first level.
    pub(super) fn root(&self) -> u64 {
        self.plan.gpa(abi::TABLES)
    }

    /// Where it is in this process.
    pub(super) fn host_address(&self) -> u64 {
        self.memory.iter().next().map_or(0, |region| region.as_ptr() as u64)
    }

    /// Writes at a linear address.
    pub(super) fn write(&self, linear: u64, bytes: &[u8]) -> Result<(), StubError> {
        let written = self.memory.write_slice(bytes, GuestAddress(self.plan.gpa(linear)));
        written.map_err(|error| StubError::Failed(error.to_string()))
    }

    /// Has bytes written at a linear address, unless they are more than there are.
    pub(super) fn fill<E>(
        &mut self,
        linear: u64,
        len: u64,
        write: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Ok(place) = self.memory.get_slice(GuestAddress(self.plan.gpa(linear)), len as usize) else {
            return Ok(());
        };
        // SAFETY: the place is mapped, and nobody else's: the vCPU stands still, and what has the memory besides is borrowed here.
        write(unsafe { std::slice::from_raw_parts_mut(place.ptr_guard_mut().as_ptr(), len as usize) })
    }

    /// A parameter.
    pub(super) fn parameter(&self, word: abi::Word) -> u64 {
        self.read(abi::PARAMETERS + 8 * word as u64)
    }

    /// Lets the stub see a range; both its addresses are multiples of [`LARGE`].
    pub(super) fn map(&mut self, window: Window) -> Result<(), StubError> {
        let flags = PRESENT | USER | IS_LARGE | if window.writable { WRITABLE } else { 0 };
        for at in (0..window.len).step_by(LARGE as usize) {
            let entry = self.entry(window.linear + at)?;
            self.write(entry, &((window.gpa + at) | flags).to_le_bytes())?;
        }
        Ok(())
    }

    /// The linear address of the entry in the last level; tables that are not there yet are made.
    fn entry(&mut self, linear: u64) -> Result<u64, StubError> {
        let mut table = abi::TABLES;
        for shift in &SHIFTS[..2] {
            let entry = slot(table, linear, *shift);
            if self.read(entry) & PRESENT == 0 {
                let new = self.take_page()?;
                self.write(entry, &(self.plan.gpa(new) | PRESENT | WRITABLE | USER).to_le_bytes())?;
            }
            table = (self.read(entry) & ADDRESS) - self.plan.base + abi::BASE;
        }
        Ok(slot(table, linear, SHIFTS[2]))
    }

    fn take_page(&mut self) -> Result<u64, StubError> {
        let page = self.next;
        self.next += PAGE_SIZE;
        if self.next > self.plan.holes {
            return Err(StubError::Failed("its page tables have no room".to_owned()));
        }
        Ok(page)
    }

    /// All addresses are within the memory, so that a read can't fail.
    fn read(&self, linear: u64) -> u64 {
        self.memory.read_obj(GuestAddress(self.plan.gpa(linear))).unwrap_or_default()
    }
}

fn slot(table: u64, linear: u64, shift: u32) -> u64 {
    table + 8 * (linear >> shift & 511)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_the_tables_of_any_machine() {
        for len in [0, 4 << 20, 3 * GIB, 3 * GIB + PAGE_SIZE, 5 * GIB, 700 * GIB] {
            let plan = Plan::new(len, len / PAGE_SIZE / 8);
            assert!(
                plan.base >= 4 * GIB + len
                    && plan.base.is_multiple_of(GIB)
                    && plan.image.is_multiple_of(LARGE)
            );
            let mut memory = StubMemory::new(plan, &[]).unwrap();
            let window = |linear, gpa, len| Window { linear, gpa, len, writable: true };
            memory.map(window(abi::BASE, plan.base, plan.size)).unwrap();
            memory.map(window(abi::IMAGE, plan.image, len)).unwrap();
            for (gpa, len) in crate::layout::ram_ranges(len) {
                memory.map(window(abi::RAM + gpa, gpa, len)).unwrap();
            }
        }
    }
}
