//! The functions that compiled code expects of a C library.

use core::arch::asm;

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller says that both ranges are valid; the direction flag is clear.
    unsafe { asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the ranges overlap, if at all, so that copying upwards is right.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: downwards from the last byte; the direction flag is cleared again.
    unsafe {
        let (to, from) = (to.wrapping_add(len).wrapping_sub(1), from.wrapping_add(len).wrapping_sub(1));
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _)
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: as for memcpy.
    unsafe { asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value as u8) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: the caller says that both ranges are valid. Volatile, or the compiler calls memcmp again.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe { memcmp(a, b, len) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller says that there is a NUL. Volatile, or the compiler calls strlen again.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
