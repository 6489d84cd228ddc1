//! ptrace(2) on x86-64, as far as it is needed here.
//!
//! In: threads. Out: their registers, and news of them. Holds: signals are numbers, since those that interrupt vCPUs are
//! real-time signals.

use libc::{c_long, c_void, pid_t, user_regs_struct};
use std::io;

/// What a traced thread has come to.
pub(super) enum News {
    /// Nothing has happened.
    None,
    /// There is nobody to trace any more.
    Nobody,
    /// It enters a system call, or leaves it.
    Call(pid_t),
    /// It would get this signal.
    Signal(pid_t, i32),
    /// It has stopped for the tracer's sake.
    Stop(pid_t),
    /// It has ended.
    End,
}

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE;
/// How a stop at a system call is told from a SIGTRAP, by that option.
const AT_A_CALL: i32 = libc::SIGTRAP | 0x80;

/// Begins to trace, and stops the thread.
pub(super) fn seize(thread: pid_t) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, thread, OPTIONS as usize)?;
    ptrace(libc::PTRACE_INTERRUPT, thread, 0)
}

/// Lets a thread run to the next system call, having got this signal, if it isn't 0.
pub(super) fn go_on(thread: pid_t, signal: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SYSCALL, thread, signal as usize)
}

/// The registers of a thread that has stopped.
pub(super) fn registers(thread: pid_t) -> io::Result<user_regs_struct> {
    // SAFETY: all zero is a value of this struct of integers.
    let mut regs: user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, thread, (&raw mut regs).addr())?;
    Ok(regs)
}

/// Gives a thread that has stopped other registers.
pub(super) fn set_registers(thread: pid_t, regs: &user_regs_struct) -> io::Result<()> {
    ptrace(libc::PTRACE_SETREGS, thread, std::ptr::from_ref(regs).addr())
}

/// What this thread's tracees have come to meanwhile; does not wait.
pub(super) fn news() -> io::Result<News> {
    let mut status = 0;
    // SAFETY: the status is a place for the call's answer.
    let thread =
        unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG) };
    if thread < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ECHILD) { Ok(News::Nobody) } else { Err(error) };
    }
    Ok(match (thread, libc::WIFSTOPPED(status), status >> 16, libc::WSTOPSIG(status)) {
        (0, ..) => News::None,
        (_, false, ..) => News::End,
        (_, true, 0, AT_A_CALL) => News::Call(thread),
        (_, true, 0, signal) => News::Signal(thread, signal),
        _ => News::Stop(thread),
    })
}

fn ptrace(request: u32, thread: pid_t, data: usize) -> io::Result<()> {
    let address = std::ptr::null_mut::<c_void>();
    // SAFETY: where `data` is an address, its caller has just taken it from a struct of the request's type.
    let done: c_long = unsafe { libc::ptrace(request, thread, address, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
