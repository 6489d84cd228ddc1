//! Guest RAM that is copied ahead of an instant at which it is to be frozen.
//!
//! In: a restored guest's RAM, and a log of what is written into it. Out: the same RAM, frozen, once the guest stands still. Holds: a page that was
//! not copied, or written since, is as the snapshot has it; the guest stands still only for the last few.
//!
//! ```text
//! the guest runs    log on · copy what is not the snapshot's · copy what was written since · … · little is left
//! it stands still   copy what was written since
//! ```
//!
//! A restored guest has small pages, since its RAM is a file's, so that a copy of the process (`crate::frozen`) takes tens of milliseconds for each GiB.

use crate::dirty_log::DirtyLog;
use crate::frozen::{FreezeError, FrozenRam, Room};
use crate::kvm::Ioctl;
use crate::ram::GuestRam;
use kvm_ioctls::VmFd;
use snapshot::PageSet;
use std::io;
use std::sync::Arc;

/// Pages that a process has of a guest's RAM from which on it is worth it: a copy of the process takes a millisecond or two for so many.
const WORTH: u64 = 8192;
/// Pages that may be left when the guest has to stand still. Each takes a microsecond or less.
const LEFT: u64 = 512;
/// How often what was written is copied again, before it is given up.
const ROUNDS: usize = 12;

/// Why RAM was not copied ahead.
#[derive(Debug, thiserror::Error)]
pub enum AheadError {
    /// KVM's dirty log.
    #[error(transparent)]
    Log(#[from] Ioctl),
    /// RAM, or what has the copies.
    #[error(transparent)]
    Copy(#[from] io::Error),
    /// A guest that is faster.
    #[error("the guest writes faster than it can be copied: {pages} pages in the last round")]
    TooFast {
        /// Pages that it wrote.
        pages: u64,
    },
    /// The snapshot was given up.
    #[error("nobody wants it any more")]
    Cancelled,
}

/// A log that was begun for this, or one that others need too.
#[derive(Debug)]
pub struct Borrowed {
    log: Arc<DirtyLog>,
    own: bool,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if self.own {
            self.log.stop();
        }
    }
}

/// Where RAM is copied to. Made by a thread that lives as long as it is needed.
#[derive(Debug)]
pub struct Plan {
    ram: GuestRam,
    room: Room,
    vm: Arc<VmFd>,
    log: Option<Arc<DirtyLog>>,
}

impl Plan {
    /// For this RAM, if there is so much in use of it that a copy of the process would take longer. `log` is one that others need.
    ///
    /// # Errors
    /// See [`FreezeError`].
    pub(crate) fn of(
        ram: &GuestRam,
        vm: &Arc<VmFd>,
        log: Option<Arc<DirtyLog>>,
    ) -> Result<Option<Self>, FreezeError> {
        if !ram.is_mapped() || ram.pages_here().unwrap_or(0) < WORTH {
            return Ok(None);
        }
        Ok(Some(Self { ram: ram.clone(), room: Room::of(ram)?, vm: vm.clone(), log }))
    }

    /// Copies until little is left, or `go_on` says no. `between` is called once, when most is done; what is written meanwhile is copied after it.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub fn copy(self, go_on: &dyn Fn() -> bool, between: impl FnOnce()) -> Result<CopiedAhead, AheadError> {
        let own = self.log.is_none();
        let log = self.log.map_or_else(|| DirtyLog::start(&self.vm, &self.ram).map(Arc::new), Ok)?;
        let mut ahead = CopiedAhead { ram: self.ram, room: self.room, log: Borrowed { log, own } };
        ahead.written()?;
        let pages = ahead.ram.own_pages()?;
        ahead.room.put(&pages, go_on)?;
        between();
        for _ in 0..ROUNDS {
            let left = ahead.written()?;
            ahead.room.put(&left, go_on)?;
            match left.len() {
                _ if !go_on() => return Err(AheadError::Cancelled),
                pages if pages <= LEFT => return Ok(ahead),
                _ => {}
            }
        }
        let pages = ahead.written()?.len();
        Err(AheadError::TooFast { pages })
    }
}

/// RAM of which little is left to copy.
#[derive(Debug)]
pub struct CopiedAhead {
    ram: GuestRam,
    room: Room,
    log: Borrowed,
}

impl CopiedAhead {
    /// Whether it is this RAM.
    pub fn is_of(&self, ram: &GuestRam) -> bool {
        self.ram.is_same(ram)
    }

    fn written(&self) -> Result<PageSet, AheadError> {
        self.log.log.note()?;
        Ok(self.ram.take_ahead())
    }

    /// The RAM as it is now; nobody may write to it. The log is ended by dropping it, which takes a moment that the guest need not wait for.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub fn finish(mut self) -> Result<(FrozenRam, Borrowed), AheadError> {
        self.log.log.note()?;
        let left = self.ram.end_ahead();
        self.room.put(&left, &|| true)?;
        Ok((self.room.freeze(), self.log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::FileRange;
    use crate::vm;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    /// Mapped, with so many pages in use.
    fn machine(used: u64) -> (GuestRam, Arc<VmFd>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 4096], 63 << 20).unwrap();
        let range = FileRange { gpa: 0, len: 64 << 20, offset: 0 };
        let ram = GuestRam::from_snapshot(file, &[range]).unwrap();
        (0..used).for_each(|page| write(&ram, page, 1));
        let vm = vm::create(&vm::open().unwrap(), Some(&ram)).unwrap();
        (ram, vm)
    }

    fn write(ram: &GuestRam, page: u64, byte: u8) {
        ram.memory().write_obj(byte, GuestAddress(page << 12)).unwrap();
    }

    #[test]
    fn what_is_written_meanwhile_is_there_and_what_is_written_later_is_not() {
        let (ram, vm) = machine(WORTH);
        let plan = Plan::of(&ram, &vm, None).unwrap().expect("worth it");
        let ahead = plan.copy(&|| true, || (0..LEFT + 1).for_each(|page| write(&ram, page, 2))).unwrap();
        write(&ram, 5, 3);
        write(&ram, WORTH + 5, 3);
        let (frozen, log) = ahead.finish().unwrap();
        drop(log);
        [4, 5, 6, WORTH - 1, WORTH + 6].iter().for_each(|page| write(&ram, *page, 9));
        let byte = |page: u64| {
            let mut bytes = [0; 4096];
            frozen.read(page << 12, &mut bytes).unwrap();
            bytes[0]
        };
        let pages = [4, 5, 6, WORTH - 1, WORTH + 5, WORTH + 6, 63 << 8].map(byte);
        assert_eq!(pages, [2, 3, 2, 1, 3, 0, 7]);
    }

    #[test]
    fn little_ram_is_not_worth_it_and_what_nobody_wants_is_given_up() {
        let (ram, vm) = machine(WORTH / 2);
        assert!(Plan::of(&ram, &vm, None).unwrap().is_none());
        let (ram, vm) = machine(WORTH);
        let plan = Plan::of(&ram, &vm, None).unwrap().expect("worth it");
        assert!(matches!(plan.copy(&|| false, || ()), Err(AheadError::Cancelled)));
        DirtyLog::start(&vm, &ram).unwrap().stop();
    }
}
