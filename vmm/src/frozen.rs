//! Frozen RAM: guest RAM as it was at one instant, while the guest runs on.
//!
//! In: the RAM of a machine that stands still. Out: the same bytes, for as long as they are needed. Holds: a child of this process has
//! them; either all, as a copy that the host makes page by page as the guest writes, or what was copied ahead into it, and the rest is as
//! the snapshot has it that RAM is mapped from.
//!
//! The host needs no more memory than the pages that are written meanwhile, and those that were read already are given back. If it has too
//! little, the child is the first to go, and with it the snapshot, not the guest.

mod child;
mod room;

use crate::ram::{ChangesError, GuestRam, RamError};
use child::Child;
use room::Rest;
pub(crate) use room::Room;
use snapshot::{PageSet, Parent};
use std::io;

/// Why RAM could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No child.
    #[error("cannot freeze guest RAM: the host gives no copy of this process")]
    Copy(#[source] io::Error),
    /// A child that can't be looked into.
    #[error("cannot freeze guest RAM")]
    Look(#[from] RamError),
}

/// RAM as of an instant.
#[derive(Debug)]
pub struct FrozenRam {
    /// As the child has it.
    ram: GuestRam,
    child: Child,
    /// What the child has not, if it has not all.
    rest: Option<Rest>,
}

impl FrozenRam {
    /// Freezes RAM that nobody writes just now. The child ends with the thread that calls this.
    ///
    /// # Errors
    /// The host has no room for another process, or won't let this one look into it.
    pub fn of(ram: &GuestRam) -> Result<Self, FreezeError> {
        let child = ram.while_copied(Child::new).map_err(FreezeError::Copy)?;
        Ok(Self { ram: ram.as_in(child.id)?, child, rest: None })
    }

    /// Has the host end the child rather than this process if it has no memory left. Takes a moment that the guest need not wait for.
    pub fn yield_first(&self) {
        self.child.yield_first();
    }

    /// As [`GuestRam::read_touched`].
    ///
    /// # Errors
    /// As [`GuestRam::read_touched`].
    pub fn read_touched(&self, gpa: u64, buf: &mut [u8]) -> io::Result<bool> {
        match &self.rest {
            Some(rest) => rest.read_touched(&self.ram, gpa, buf),
            None => self.ram.read_touched(gpa, buf),
        }
    }

    /// As [`GuestRam::read`].
    ///
    /// # Errors
    /// As [`GuestRam::read`].
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        match &self.rest {
            Some(rest) => rest.read(&self.ram, gpa, buf),
            None => self.ram.read(gpa, buf),
        }
    }

    /// As [`GuestRam::changed_since`].
    ///
    /// # Errors
    /// As [`GuestRam::changed_since`].
    pub fn changed_since(&self, parent: &Parent) -> Result<PageSet, ChangesError> {
        match &self.rest {
            Some(rest) => rest.running().expect_origin(parent).map(|()| rest.changed()),
            None => self.ram.changed_since(parent),
        }
    }

    /// Whether all that was read until now was as it was: a host that is short of memory takes a child's away before the child is gone.
    ///
    /// `waiting` is called now and then until that is known, and may end the wait.
    ///
    /// # Errors
    /// The child has been ended, or does not answer; or what `waiting` said.
    pub fn check(&self, waiting: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        self.child.check(waiting)
    }

    /// Gives back what will not be read again.
    pub fn release(&self, gpa: u64, len: u64) {
        if let Some(host) = self.ram.host_address(gpa, len) {
            self.child.order([host, len]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::FileRange;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1 << 20;

    fn byte(ram: &GuestRam, gpa: u64) -> Option<u8> {
        let mut chunk = vec![0; MIB as usize];
        ram.read_touched(gpa, &mut chunk).unwrap().then(|| chunk[0])
    }

    fn frozen_byte(frozen: &FrozenRam, gpa: u64) -> Option<u8> {
        byte(&frozen.ram, gpa)
    }

    /// Freezes, writes, and looks at both.
    fn stays_as_it_was(ram: &GuestRam) {
        let frozen = FrozenRam::of(ram).unwrap();
        frozen.yield_first();
        for gpa in [0, 2 * MIB] {
            ram.memory().write_obj(9u8, GuestAddress(gpa)).unwrap();
        }
        assert_eq!((frozen_byte(&frozen, 0), frozen_byte(&frozen, 2 * MIB)), (Some(1), None));
        frozen.release(0, MIB);
        assert_eq!((byte(ram, 0), byte(ram, 2 * MIB)), (Some(9), Some(9)));
    }

    #[test]
    fn what_is_written_later_is_not_seen() {
        let ram = GuestRam::new(4 * MIB).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        stays_as_it_was(&ram);
        stays_as_it_was_again(&ram);
    }

    /// Once more, of what the first left.
    fn stays_as_it_was_again(ram: &GuestRam) {
        let frozen = FrozenRam::of(ram).unwrap();
        ram.memory().write_obj(3u8, GuestAddress(0)).unwrap();
        assert_eq!(frozen_byte(&frozen, 0), Some(9));
    }

    #[test]
    fn nor_is_it_in_a_snapshots_mapping() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(&[1], 0).unwrap();
        let range = FileRange { gpa: 0, len: 4 * MIB, offset: 0 };
        stays_as_it_was(&GuestRam::from_snapshot(file, &[range]).unwrap());
    }

    #[test]
    fn the_child_ends_with_it() {
        let frozen = FrozenRam::of(&GuestRam::new(MIB).unwrap()).unwrap();
        let id = frozen.child.id;
        drop(frozen);
        // SAFETY: signal 0 only asks.
        assert_eq!(unsafe { libc::kill(id, 0) }, -1);
    }

    #[test]
    fn a_child_that_is_gone_is_an_error() {
        let ram = GuestRam::new(MIB).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        let frozen = FrozenRam::of(&ram).unwrap();
        frozen.check(&|| Ok(())).unwrap();
        // SAFETY: the child has not been waited for.
        unsafe { libc::kill(frozen.child.id, libc::SIGKILL) };
        assert!(frozen.check(&|| Ok(())).is_err());
    }
}
