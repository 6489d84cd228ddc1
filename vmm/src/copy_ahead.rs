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
/// How often what was written is copied again, until no more than that is left.
const ROUNDS: usize = 12;
/// More may be left then, if a copy of the process would take longer all the same: for so many pages of it, as for one that is copied.
const DEARER: u64 = 8;

/// Why RAM was not copied ahead.
#[derive(Debug, thiserror::Error)]
pub enum AheadError {
    /// KVM's dirty log.
    #[error(transparent)]
    Log(#[from] Ioctl),
    /// RAM, or what has the copies.
    #[error(transparent)]
    Copy(#[from] io::Error),
    /// Room for the copies.
    #[error(transparent)]
    Room(#[from] FreezeError),
    /// A guest that is faster.
    #[error("the guest writes faster than it can be copied: {pages} pages in the last round")]
    TooFast {
        /// Pages that it wrote.
        pages: u64,
    },
    /// The snapshot was given up.
    #[error("nobody wants the snapshot any more")]
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
    /// Pages that may be left in the end.
    bearable: u64,
}

impl Plan {
    /// For this RAM, if there is so much in use of it that a copy of the process would take longer. `log` is one that others need.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub(crate) fn of(
        ram: &GuestRam,
        vm: &Arc<VmFd>,
        log: Option<Arc<DirtyLog>>,
    ) -> Result<Option<Self>, AheadError> {
        if !ram.is_mapped() {
            return Ok(None);
        }
        let pages = ram.pages_here()?;
        if pages < WORTH {
            return Ok(None);
        }
        let (room, vm) = (Room::of(ram)?, vm.clone());
        Ok(Some(Self { ram: ram.clone(), room, vm, log, bearable: pages / DEARER }))
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
        if go_on() {
            between();
        }
        let mut pages = u64::MAX;
        for _ in 0..ROUNDS {
            pages = ahead.catch_up(go_on)?;
            if !go_on() {
                return Err(AheadError::Cancelled);
            }
            if pages <= LEFT {
                return Ok(ahead);
            }
        }
        if pages <= self.bearable { Ok(ahead) } else { Err(AheadError::TooFast { pages }) }
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
    /// Copies what was written since the last time; returns how many pages that were. The guest may run.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub fn catch_up(&mut self, go_on: &dyn Fn() -> bool) -> Result<u64, AheadError> {
        let left = self.written()?;
        self.room.put(&left, go_on)?;
        Ok(left.len())
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
    use crate::discard::RamDiscard;
    use crate::ram::FileRange;
    use crate::vm;
    use devices::virtio::{Discard, Segment};
    use snapshot::{GenerationId, Parent};
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

    fn byte(frozen: &FrozenRam, page: u64) -> u8 {
        let mut bytes = [0; 4096];
        frozen.read(page << 12, &mut bytes).unwrap();
        bytes[0]
    }

    fn plan(ram: &GuestRam, vm: &Arc<VmFd>) -> Plan {
        Plan::of(ram, vm, None).unwrap().expect("worth it")
    }

    #[test]
    fn what_is_written_meanwhile_is_there_and_what_is_written_later_is_not() {
        let (ram, vm) = machine(WORTH);
        let write_some = || (0..LEFT + 1).for_each(|page| write(&ram, page, 2));
        let mut ahead = plan(&ram, &vm).copy(&|| true, write_some).unwrap();
        write(&ram, 4, 4);
        assert_eq!(ahead.catch_up(&|| true).unwrap(), 1);
        write(&ram, 5, 3);
        write(&ram, WORTH + 5, 3);
        let (frozen, log) = ahead.finish().unwrap();
        drop(log);
        [4, 5, 6, WORTH - 1, WORTH + 6].iter().for_each(|page| write(&ram, *page, 9));
        let pages = [4, 5, 6, WORTH - 1, WORTH + 5, WORTH + 6, 63 << 8].map(|page| byte(&frozen, page));
        assert_eq!(pages, [4, 3, 2, 1, 3, 0, 7]);
    }

    /// A page that was copied may be the snapshot's again, or be there no more.
    #[test]
    fn what_the_guest_gives_back_meanwhile_is_as_it_is_then() {
        let (ram, vm) = machine(WORTH);
        (63 << 8..64 << 8).for_each(|page| write(&ram, page, 1));
        let give_back = |address, len| RamDiscard::new(&ram).discard(Segment { address, len });
        let ahead = plan(&ram, &vm).copy(&|| true, || give_back(2 << 20, 4 << 20)).unwrap();
        give_back(63 << 20, 4096);
        give_back(0, 2 << 20);
        write(&ram, 0, 5);
        let (frozen, _log) = ahead.finish().unwrap();
        let pages = [0, 1, 512, 1535, 1536, 63 << 8, (63 << 8) + 1].map(|page| byte(&frozen, page));
        assert_eq!(pages, [5, 0, 0, 0, 1, 7, 1]);
    }

    #[test]
    fn a_guest_that_is_too_fast_is_told_of_unless_it_can_be_borne() {
        let (ram, vm) = machine(WORTH);
        let writes = |pages, byte| (0..pages).for_each(|page| write(&ram, page, byte));
        let fast = |pages| {
            move || {
                writes(pages, 2);
                true
            }
        };
        let too_fast = plan(&ram, &vm).copy(&fast(WORTH / DEARER + 1), || ());
        assert!(matches!(too_fast, Err(AheadError::TooFast { pages }) if pages > WORTH / DEARER));
        let ahead = plan(&ram, &vm).copy(&fast(WORTH / DEARER), || ()).unwrap();
        writes(LEFT, 3);
        let (frozen, _log) = ahead.finish().unwrap();
        assert_eq!([0, LEFT, WORTH / DEARER + 1].map(|page| byte(&frozen, page)), [3, 2, 1]);
    }

    /// Of a VM that is tracked: the log goes on, and whoever else takes of it takes nothing away.
    #[test]
    fn a_log_that_others_need_is_shared() {
        let (ram, vm) = machine(WORTH);
        let log = Arc::new(DirtyLog::start(&vm, &ram).unwrap());
        let parent = Parent { generation: GenerationId([3; 16]), digest: 5, hint: String::new() };
        ram.begin_epoch(parent.generation).is_whole(5);
        write(&ram, 1, 2);
        let noted_elsewhere = || {
            write(&ram, 2, 2);
            log.note().unwrap();
        };
        let ahead = Plan::of(&ram, &vm, Some(log.clone())).unwrap().unwrap().copy(&|| true, noted_elsewhere);
        let mut ahead = ahead.unwrap();
        write(&ram, 3, 2);
        log.note().unwrap();
        assert_eq!(ahead.catch_up(&|| true).unwrap(), 1);
        let (frozen, borrowed) = ahead.finish().unwrap();
        drop(borrowed);
        write(&ram, 4, 2);
        log.note().unwrap();
        assert_eq!([1, 2, 3, 4].map(|page| byte(&frozen, page)), [2, 2, 2, 1]);
        let written: Vec<_> = ram.written_since(&parent).unwrap().runs(0..WORTH).flatten().collect();
        assert_eq!(written, [1, 2, 3, 4]);
    }

    /// The host may end it at any time, if it is short of memory.
    #[test]
    fn a_child_that_is_gone_is_told_of_and_the_log_ends() {
        let (ram, vm) = machine(WORTH);
        let plan = plan(&ram, &vm);
        let me = std::fs::read_to_string("/proc/thread-self/children").unwrap();
        let children: Vec<i32> = me.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let end = || {
            // SAFETY: this thread's children, none of which has been waited for.
            children.iter().for_each(|id| assert_eq!(unsafe { libc::kill(*id, libc::SIGKILL) }, 0));
            let is_gone =
                |id: &i32| std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap().contains(") Z");
            while !children.iter().all(is_gone) {
                std::thread::yield_now();
            }
            write(&ram, 1, 2);
        };
        assert!(!children.is_empty());
        assert!(matches!(plan.copy(&|| true, end), Err(AheadError::Copy(_))));
        assert!(log_is_off(&vm), "it goes on");
    }

    #[test]
    fn little_ram_is_not_worth_it_and_what_nobody_wants_is_given_up() {
        let (ram, vm) = machine(WORTH / 2);
        assert!(Plan::of(&ram, &vm, None).unwrap().is_none());
        let (ram, vm) = machine(WORTH);
        let wanted = || panic!("nobody waits for the disks then");
        assert!(matches!(plan(&ram, &vm).copy(&|| false, wanted), Err(AheadError::Cancelled)));
        assert!(log_is_off(&vm), "it goes on");
    }

    fn log_is_off(vm: &VmFd) -> bool {
        vm.get_dirty_log(0, 64 << 20).is_err()
    }
}
