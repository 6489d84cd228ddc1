//! Copies out of memory that may be gone.
//!
//! In: an address in this process. Out: its bytes. Holds: what is gone is an answer, where any other load would be a SIGBUS: one instruction
//! loads here, and the handler has it end early.
//!
//! A system call answers so as well, but a read of `/proc/self/mem` takes 6 µs for a page on this project's machine,
//! `process_vm_readv` 4 µs, and this 0.8 µs.

use std::arch::naked_asm;
use std::ffi::c_void;

/// Bytes of the instruction, `rep movsq`.
const LENGTH: i64 = 3;

/// Bytes of a word: what is copied has whole ones.
pub(crate) const WORD: usize = 8;

/// Part of what was asked for is gone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gone;

/// Copies whole words from an address.
///
/// # Safety
/// They lie in a mapping that this process may read, and SIGBUS is [`give_up`]'s.
pub(super) unsafe fn words(from: u64, to: &mut [u8]) -> Result<(), Gone> {
    debug_assert!(to.len().is_multiple_of(WORD));
    // SAFETY: no more is written than `to` has, and `from` is readable by the caller's word, or the handler ends it.
    let left = unsafe { copy(to.as_mut_ptr(), from, 0, (to.len() / WORD) as u64) };
    if left == 0 { Ok(()) } else { Err(Gone) }
}

/// Returns how many words are left. By the calling convention the count is in RCX, as the instruction wants it, if it is the fourth
/// argument, and source and destination are in place: so the instruction is the first, and its address the function's.
#[unsafe(naked)]
unsafe extern "sysv64" fn copy(to: *mut u8, from: u64, _: u64, words: u64) -> u64 {
    naked_asm!("rep movsq", "mov rax, rcx", "ret")
}

/// For the handler of SIGBUS, with its context: a copy that was interrupted goes on behind its instruction. `false` if it was none.
///
/// # Safety
/// The context is the one that the kernel gave the handler.
pub(super) unsafe fn give_up(context: *mut c_void) -> bool {
    // SAFETY: the kernel's context is a `ucontext_t` that nobody else uses; what the handler writes there, the thread goes on with.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = &mut registers[libc::REG_RIP as usize];
    let copying = *at == copy as *const () as i64;
    if copying {
        *at += LENGTH;
    }
    copying
}
