//! Frozen RAM: guest RAM as it was at one instant, while the guest runs on.
//!
//! In: the RAM of a machine that stands still. Out: the same bytes, for as long as they are needed. Holds: a child of this process has
//! them, a copy that the host makes page by page as the guest writes; it shares this process's descriptors and runs nothing of it, and
//! it ends with this process, however that ends.
//!
//! The host needs no more memory than the pages that are written meanwhile, and those that were read already are given back. If it has too
//! little, the child is the first to go, and with it the snapshot, not the guest.

use crate::ram::{GONE, GuestRam, RamError};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

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
    ram: GuestRam,
    child: Child,
}

impl FrozenRam {
    /// Freezes RAM that nobody writes just now. The child ends with the thread that calls this.
    ///
    /// # Errors
    /// The host has no room for another process, or won't let this one look into it.
    pub fn of(ram: &GuestRam) -> Result<Self, FreezeError> {
        let child = ram.while_copied(Child::new).map_err(FreezeError::Copy)?;
        Ok(Self { ram: ram.as_in(child.id)?, child })
    }

    /// Has the host end the child rather than this process if it has no memory left. Takes a moment that the guest need not wait for.
    pub fn yield_first(&self) {
        // What can't be said stays unsaid: the host then chooses by size.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", self.child.id), "1000");
    }

    /// The RAM, to be read.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Whether all that was read until now was as it was: a host that is short of memory takes a child's away before the child is gone.
    ///
    /// `waiting` is called now and then until that is known, and may end the wait.
    ///
    /// # Errors
    /// The child has been ended, or does not answer; or what `waiting` said.
    pub fn check(&self, waiting: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.child.order(ANSWER) {
            // It has thousands of orders to go through first.
            waiting()?;
            std::thread::sleep(MOMENT);
            self.child.is_there(deadline)?;
        }
        while !self.child.has_answered() {
            waiting()?;
            self.child.is_there(deadline)?;
        }
        Ok(())
    }

    /// Gives back what will not be read again.
    pub fn release(&self, gpa: u64, len: u64) {
        if let Some(host) = self.ram.host_address(gpa, len) {
            self.child.order([host, len]);
        }
    }
}

/// A child that does nothing but forget memory when it is told to.
#[derive(Debug)]
struct Child {
    id: i32,
    orders: OwnedFd,
    answers: OwnedFd,
    /// Readable when it has ended.
    end: OwnedFd,
    /// The child's ends, in the table of descriptors that it shares.
    _its: [OwnedFd; 2],
}

/// The order that asks for an answer.
const ANSWER: [u64; 2] = [0; 2];
/// How long an answer may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is waited for at a time.
const MOMENT: Duration = Duration::from_millis(10);

impl Child {
    fn new() -> io::Result<Self> {
        let ((taken, orders), (answers, given)) = (pipe()?, pipe()?);
        let parent = std::process::id() as i32;
        // No signal tells of its end, which is waited for. Sharing the descriptors it keeps none open that this process closes.
        let flags = libc::CLONE_FILES as libc::c_long;
        // SAFETY: without CLONE_VM the child has a copy of this stack and goes on below; it makes system calls only, since a lock of
        // another thread may be held in its copy for ever.
        match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
            0 => obey(parent, taken.as_raw_fd(), given.as_raw_fd()),
            id if id > 0 => match end_of(id as i32) {
                Ok(end) => Ok(Self { id: id as i32, orders, answers, end, _its: [taken, given] }),
                Err(error) => {
                    end(id as i32);
                    Err(error)
                }
            },
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// `false` if there is no room for the order now.
    fn order(&self, words: [u64; 2]) -> bool {
        // SAFETY: as many bytes as there are. So few are written whole or not at all (pipe(7)).
        unsafe { libc::write(self.orders.as_raw_fd(), words.as_ptr().cast(), size_of_val(&words)) > 0 }
    }

    /// Whether it has come to the order for an answer, which it does not if it was told to end before.
    fn has_answered(&self) -> bool {
        if !is_readable(&self.answers, MOMENT) {
            return false;
        }
        let mut byte = 0u8;
        // SAFETY: room for one byte.
        unsafe { libc::read(self.answers.as_raw_fd(), (&raw mut byte).cast(), 1) == 1 }
    }

    fn is_there(&self, deadline: Instant) -> io::Result<()> {
        let gone = is_readable(&self.end, Duration::ZERO) || Instant::now() > deadline;
        if gone { Err(io::Error::other(GONE)) } else { Ok(()) }
    }
}

fn is_readable(fd: &OwnedFd, within: Duration) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one whole pollfd.
    unsafe { libc::poll(&mut polled, 1, within.as_millis() as libc::c_int) > 0 }
}

impl Drop for Child {
    fn drop(&mut self) {
        end(self.id);
    }
}

/// Ends a child that has not been waited for.
fn end(id: i32) {
    // SAFETY: until it is waited for the id is its own.
    unsafe { libc::kill(id, libc::SIGKILL) };
    // SAFETY: a null status is not written. `__WALL`: a child that sends no signal is waited for as well.
    while unsafe { libc::waitpid(id, std::ptr::null_mut(), libc::__WALL) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// What becomes readable when it ends.
fn end_of(id: i32) -> io::Result<OwnedFd> {
    // SAFETY: two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The child's life. Takes no lock, allocates nothing, and never returns.
fn obey(parent: i32, taken: RawFd, given: RawFd) -> ! {
    let mut words = [0u64; 2];
    // SAFETY: system calls on numbers and on this stack. `madvise` makes the child forget parts of guest RAM, which is all that it is told of.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        // It may have ended before the call.
        while libc::getppid() == parent {
            let count = libc::read(taken, words.as_mut_ptr().cast(), size_of_val(&words));
            if words == ANSWER {
                libc::write(given, words.as_ptr().cast(), 1);
            } else if count == size_of_val(&words) as isize {
                libc::madvise(words[0] as *mut _, words[1] as usize, libc::MADV_DONTNEED);
            }
        }
        libc::_exit(0)
    }
}

/// The child waits for orders, this process for nothing.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: two new descriptors, which nobody else owns.
    let (taken, orders) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: a descriptor and a flag.
    if unsafe { libc::fcntl(orders.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((taken, orders))
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

    /// Freezes, writes, and looks at both.
    fn stays_as_it_was(ram: &GuestRam) {
        let frozen = FrozenRam::of(ram).unwrap();
        frozen.yield_first();
        for gpa in [0, 2 * MIB] {
            ram.memory().write_obj(9u8, GuestAddress(gpa)).unwrap();
        }
        assert_eq!((byte(frozen.ram(), 0), byte(frozen.ram(), 2 * MIB)), (Some(1), None));
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
        assert_eq!(byte(frozen.ram(), 0), Some(9));
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
