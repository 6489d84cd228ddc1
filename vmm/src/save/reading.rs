//! Guest RAM on its way into a file.
//!
//! In: RAM of a machine that stands still, or as it was at one instant. Out: chunks and pages as the snapshot's writer wants them. Holds: frozen
//! RAM that was read is given back at once, and nothing more is read once nobody wants it.

use crate::frozen::FrozenRam;
use crate::layout;
use crate::ram::{ChangesError, GuestRam};
use snapshot::{ChunkContent, PageSet, Parent, RamRange, RamSource};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Guest RAM to be read once, by several threads.
pub(super) trait ReadRam: Sync {
    /// As [`GuestRam::read_touched`].
    fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool>;

    /// As [`GuestRam::read`].
    fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()>;

    /// As [`GuestRam::changed_since`].
    fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError>;

    /// Whether what was read can be relied upon.
    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadRam for GuestRam {
    fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_touched(gpa, buf)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read(gpa, buf)
    }

    fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError> {
        self.changed_since(parent)
    }
}

/// Frozen RAM, until it is needed no more.
pub(super) struct Reading<'a> {
    pub(super) ram: &'a FrozenRam,
    pub(super) cancelled: &'a AtomicBool,
}

impl ReadRam for Reading<'_> {
    fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.is_wanted()?;
        let touched = self.ram.read_touched(gpa, buf)?;
        self.ram.release(gpa, buf.len() as u64);
        Ok(touched)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.is_wanted()?;
        self.ram.read(gpa, buf)?;
        self.ram.release(gpa, buf.len() as u64);
        Ok(())
    }

    fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError> {
        self.ram.changed_since(parent)
    }

    fn finish(&self) -> io::Result<()> {
        self.ram.check(&|| self.is_wanted())
    }
}

impl Reading<'_> {
    fn is_wanted(&self) -> io::Result<()> {
        let cancelled = self.cancelled.load(Ordering::SeqCst);
        if cancelled { Err(io::Error::other("the VM was stopped meanwhile")) } else { Ok(()) }
    }
}

/// Guest RAM as the snapshot's writer reads it.
pub(super) struct SavedRam<'a> {
    ram: &'a dyn ReadRam,
    ranges: Vec<RamRange>,
}

impl<'a> SavedRam<'a> {
    pub(super) fn new(ram: &'a dyn ReadRam, memory: u64) -> Self {
        let ranges = layout::ram_ranges(memory).into_iter().map(|(gpa, len)| RamRange { gpa, len }).collect();
        Self { ram, ranges }
    }
}

impl RamSource for SavedRam<'_> {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn read_chunk(&self, gpa: u64, buf: &mut [u8]) -> io::Result<ChunkContent> {
        let touched = self.ram.read_touched(gpa, buf)?;
        Ok(if touched { ChunkContent::Data } else { ChunkContent::Zero })
    }

    fn read_pages(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.ram.read(gpa, buf)
    }

    fn finish(&self) -> io::Result<()> {
        self.ram.finish()
    }
}
