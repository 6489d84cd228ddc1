//! Copies out of memory that may be gone, and into it.
//!
//! In: two addresses in this process. Out: whether all was there. Holds: what is gone is an answer, where any other load or store would be a
//! SIGBUS: two instructions touch it, and the handler has the copy end there.
//!
//! System calls answer so as well, but a read of `/proc/self/mem` takes 6 µs for a page on this project's machine, `process_vm_readv`
//! 4 µs, and this 0.8 µs.

use std::arch::naked_asm;
use std::ffi::c_void;

/// Where in [`copy`] the two are, in bytes.
const TOUCHES: [usize; 2] = [0, 6];

/// Part of what was asked for is gone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gone;

/// Copies bytes.
///
/// # Safety
/// So many from each address on lie in mappings that this process may read and write, no byte in both, and SIGBUS is [`give_up`]'s.
pub(super) unsafe fn bytes(from: *const u8, to: *mut u8, len: usize) -> Result<(), Gone> {
    let (words, rest) = (len / 8, len % 8);
    // SAFETY: the caller's word; what is not there ends the copy.
    if unsafe { copy(to, from, rest, words) } == 0 { Ok(()) } else { Err(Gone) }
}

/// Returns 0. By the calling convention destination and source are where the instructions want them, and the fourth argument is in RCX, which
/// counts: so the first instruction is the one that copies words, with the function's address.
#[unsafe(naked)]
unsafe extern "sysv64" fn copy(to: *mut u8, from: *const u8, rest: usize, words: usize) -> u64 {
    naked_asm!("rep movsq", "mov rcx, rdx", "rep movsb", "xor eax, eax", "ret")
}

/// What a copy goes on with that can't: it returns to the caller in its place.
#[unsafe(naked)]
unsafe extern "sysv64" fn gone() -> u64 {
    naked_asm!("mov eax, 1", "ret")
}

/// For the handler of SIGBUS, with its context: a copy that was interrupted ends. `false` if it was none.
///
/// # Safety
/// The context is the one that the kernel gave the handler.
pub(super) unsafe fn give_up(context: *mut c_void) -> bool {
    // SAFETY: the kernel's context is a `ucontext_t` that nobody else uses; what the handler writes there, the thread goes on with.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = &mut registers[libc::REG_RIP as usize];
    let copying = TOUCHES.iter().any(|touch| *at == (copy as *const () as usize + touch) as i64);
    if copying {
        *at = gone as *const () as i64;
    }
    copying
}
