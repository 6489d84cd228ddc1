//! The dirty log: which pages of a running guest's RAM were written, by whoever writes them.
//!
//! In: a VM and its RAM. Out: the pages that were written since the last time they were asked for. Holds: none is missed. A page too many
//! is only a waste; a page too few would be another machine.
//!
//! Who writes guest RAM, and how that is known:
//!
//! | who | by |
//! |---|---|
//! | the guest, and KVM for it (clock pages, an emulated instruction) | KVM's dirty log |
//! | virtio devices: data and rings | `devices::Marks`, which `vm-memory` sets with each write |
//! | the host's kernel, for a disk: `preadv`, io_uring | the same, set by `disk::job` before anybody hears of the read's end |
//! | the generation id, by a copy of its own | the same, set by `ram::RamWriter` |
//! | memory that the guest gives back, which reads as zero or as the snapshot's then | the same, set by `discard` |
//!
//! Boot loaders, the restore stub and a chain's copied layers write before there is a machine to watch. A window on another kernel's memory
//! is read-only.

use crate::kvm::{self, During, Ioctl};
use crate::layout::PAGE_SIZE;
use crate::ram::GuestRam;
use crate::vm;
use devices::marks;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use snapshot::PageSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Pages of which writes are caught anew at a time; vCPUs that fault wait for KVM meanwhile. A multiple of 64, as KVM wants.
const AT_ONCE: usize = 8192;
const BITS: usize = u64::BITS as usize;

/// A log of writes, from its beginning until it is stopped.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<VmFd>,
    ram: GuestRam,
    /// Whether KVM is told which pages to catch anew, rather than doing that to all when it is asked.
    by_hand: bool,
    /// What was taken from KVM is with nobody else.
    turn: Mutex<()>,
    stopped: AtomicBool,
}

impl DirtyLog {
    /// Begins it. The guest may run, and waits no longer for it than for a part of RAM to be write-protected.
    ///
    /// # Errors
    /// The failed call; nothing is logged then.
    pub fn start(vm: &Arc<VmFd>, ram: &GuestRam) -> Result<Self, Ioctl> {
        let how = how_to_catch(vm)?;
        let by_hand = how != 0;
        let log = Self {
            vm: vm.clone(),
            ram: ram.clone(),
            by_hand,
            turn: Mutex::default(),
            stopped: AtomicBool::default(),
        };
        ram.memory().iter().for_each(|region| marks(region).start());
        let started = vm::log_writes(vm, ram, true).and_then(|()| match how & KVM_DIRTY_LOG_INITIALLY_SET {
            0 => Ok(()),
            _ => log.catch_all(),
        });
        started.inspect_err(|_| log.stop()).map(|()| log)
    }

    /// The pages that were written since the last time, or since the beginning. The guest may run: what it writes from now on is in the next
    /// answer, or in this one too.
    ///
    /// # Errors
    /// The failed call. Some of the answer is lost then.
    pub fn take(&self) -> Result<PageSet, Ioctl> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut written, mut first) = (PageSet::none_of(self.ram.page_count()), 0);
        for (region, slot) in self.ram.memory().iter().zip(0..) {
            let log = self.vm.get_dirty_log(slot, region.len() as usize).during("KVM_GET_DIRTY_LOG")?;
            if self.by_hand {
                self.catch(slot, region.len() / PAGE_SIZE, &log)?;
            }
            written.insert_words(first, &log);
            written.insert_words(first, &marks(region).take());
            first += region.len() / PAGE_SIZE;
        }
        Ok(written)
    }

    /// Notes what was written until now, for all who want to know. The guest may run, and the next time has the less to do.
    ///
    /// # Errors
    /// The failed call. Nothing is known of changes then.
    pub fn note(&self) -> Result<(), Ioctl> {
        let written = self.take().inspect_err(|_| self.ram.end_epochs())?;
        self.ram.note_written(&written);
        Ok(())
    }

    /// Ends it, which gives the guest its speed back.
    pub fn stop(&self) {
        // If KVM goes on it costs the guest some speed, and nothing else.
        let _ = vm::log_writes(&self.vm, &self.ram, false);
        self.stop_marks();
    }

    /// Once: there may be another log by then.
    fn stop_marks(&self) {
        if !self.stopped.swap(true, Ordering::SeqCst) {
            self.ram.memory().iter().for_each(|region| marks(region).stop());
        }
    }

    /// KVM says that all was written, and has caught nothing yet.
    fn catch_all(&self) -> Result<(), Ioctl> {
        self.ram.memory().iter().zip(0..).try_for_each(|(region, slot)| {
            let pages = region.len() / PAGE_SIZE;
            self.catch(slot, pages, &vec![u64::MAX; pages.div_ceil(BITS as u64) as usize])
        })
    }

    /// Has the next write to each of these pages caught.
    fn catch(&self, slot: u32, pages: u64, words: &[u64]) -> Result<(), Ioctl> {
        let parts = words.chunks(AT_ONCE / BITS).zip((0..).step_by(AT_ONCE));
        let mut written = parts.filter(|(part, _)| part.iter().any(|word| *word != 0));
        written.try_for_each(|(part, first)| {
            kvm::clear_dirty_log(&self.vm, slot, first..pages.min(first + AT_ONCE as u64), part)
        })
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        self.stop_marks();
    }
}

/// What KVM has of the ways that spare the guest a wait for all of its RAM.
fn how_to_catch(vm: &VmFd) -> Result<u32, Ioctl> {
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let how = u32::try_from(offered).unwrap_or(0) & wanted;
    if how != 0 {
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let enable = kvm_enable_cap { cap, args: [how.into(), 0, 0, 0], ..Default::default() };
        vm.enable_cap(&enable).during("KVM_ENABLE_CAP")?;
    }
    Ok(how)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discard::RamDiscard;
    use crate::ram::FileRange;
    use devices::virtio::{Discard, Segment};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1 << 20;

    /// Of RAM that is mapped from a file, with a hole between its ranges.
    fn log() -> (GuestRam, DirtyLog) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 16 << 20], 0).unwrap();
        let ranges = [(0, 0), (1 << 32, 8 * MIB)];
        let ranges = ranges.map(|(gpa, offset)| FileRange { gpa, len: 8 * MIB, offset });
        let ram = GuestRam::from_snapshot(file, &ranges).unwrap();
        let vm = vm::create(&vm::open().unwrap(), Some(&ram)).unwrap();
        let log = DirtyLog::start(&vm, &ram).unwrap();
        (ram, log)
    }

    fn taken(log: &DirtyLog) -> Vec<u64> {
        log.take().unwrap().runs(0..4096).flatten().collect()
    }

    #[test]
    fn what_the_monitor_writes_is_in_it_once() {
        let (ram, log) = log();
        assert!(taken(&log).is_empty());
        ram.memory().write_obj(1u8, GuestAddress((1 << 32) + 0x3000)).unwrap();
        ram.writer().write(0x1fff, &[1, 2]).unwrap();
        let _: u64 = ram.memory().read_obj(GuestAddress(0x9000)).unwrap();
        assert_eq!(taken(&log), [1, 2, 2051]);
        assert!(taken(&log).is_empty());
    }

    #[test]
    fn so_is_memory_that_the_guest_gives_back() {
        let (ram, log) = log();
        let mut discard = RamDiscard::new(&ram);
        discard.discard(Segment { address: 2 * MIB, len: 2 << 20 });
        discard.discard(Segment { address: (1 << 32) + 0x1000, len: 0x2000 });
        assert_eq!(taken(&log), (512..1024).chain([2049, 2050]).collect::<Vec<_>>());
    }

    #[test]
    fn one_that_was_stopped_can_be_begun_anew() {
        let (ram, log) = log();
        log.stop();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(log.take().is_err(), "KVM has no log any more");
        let log = DirtyLog::start(&log.vm, &ram).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0x2000)).unwrap();
        assert_eq!(taken(&log), [2]);
    }
}
