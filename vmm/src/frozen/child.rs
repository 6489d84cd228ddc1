//! A child of this process that has memory and runs nothing.
//!
//! In: orders to forget parts of it. Out: an answer, if it is still whole. Holds: it shares this process's descriptors, and it ends with this
//! process, however that ends.

use crate::ram::GONE;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// A child that does nothing but forget memory when it is told to.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) id: i32,
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
    pub(super) fn new() -> io::Result<Self> {
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

    /// Has the host end the child rather than this process if it has no memory left.
    pub(super) fn yield_first(&self) {
        // What can't be said stays unsaid: the host then chooses by size.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", self.id), "1000");
    }

    /// Whether it is still there, and has been until now; as [`super::FrozenRam::check`].
    pub(super) fn check(&self, waiting: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.order(ANSWER) {
            // It has thousands of orders to go through first.
            waiting()?;
            std::thread::sleep(MOMENT);
            self.is_there(deadline)?;
        }
        while !self.has_answered() {
            waiting()?;
            self.is_there(deadline)?;
        }
        Ok(())
    }

    /// `false` if there is no room for the order now.
    pub(super) fn order(&self, words: [u64; 2]) -> bool {
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
