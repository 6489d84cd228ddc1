//! Vector registers that keep their content over naps and busy loops.
//!
//! In: a round's number, the seed of its pattern. Out: which register lost what. Holds: between loading and storing, the
//! pattern is in the registers and nowhere else that is looked at: one piece of assembly loads, spins, sleeps and stores.

use std::arch::asm;

/// Bytes of a YMM register.
const WIDTH: usize = 32;
/// Bytes of an XMM register, its low half.
const XMM_WIDTH: usize = 16;
type Bank = [[u8; WIDTH]; 16];

const NAPS: u64 = 10;
const SPINS: u64 = 50_000;
const NAP: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// What this processor has: `ymm`, or `xmm` without AVX.
pub(crate) fn kind() -> &'static str {
    if is_x86_feature_detected!("avx") { "ymm" } else { "xmm" }
}

/// Holds this round's pattern in all vector registers for some 10 ms, and compares.
pub(crate) fn hold(round: u64) -> Result<(), String> {
    let pattern = pattern(round);
    let mut found = Bank::default();
    let width = if is_x86_feature_detected!("avx") {
        // SAFETY: the processor and the kernel have AVX.
        unsafe { hold_ymm(&pattern, &mut found) };
        WIDTH
    } else {
        hold_xmm(&pattern, &mut found);
        XMM_WIDTH
    };
    compare(&pattern, &found, width)
}

fn compare(pattern: &Bank, found: &Bank, width: usize) -> Result<(), String> {
    for (n, (expected, found)) in pattern.iter().zip(found).enumerate() {
        let (expected, found) = (&expected[..width], &found[..width]);
        if expected != found {
            return Err(format!("register {}{n} holds {found:02x?}, expected {expected:02x?}", kind()));
        }
    }
    Ok(())
}

/// Bytes that differ between registers, within a register and between rounds.
fn pattern(round: u64) -> Bank {
    let byte = |register: usize, at: usize| {
        let mixed = (round ^ ((register * WIDTH + at) as u64) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 56) as u8
    };
    std::array::from_fn(|register| std::array::from_fn(|at| byte(register, at)))
}

/// The assembly of both kinds: `$load`, `$store` move register `\n`, `$end` goes before the return to Rust.
macro_rules! hold {
    ($pattern:expr, $found:expr, $load:literal, $store:literal, $end:literal) => {
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            $load,
            ".endr",
            "2: mov r13, {spins}",
            "3: dec r13",
            "jnz 3b",
            "mov eax, {nanosleep}",
            "xor esi, esi",
            "syscall",
            "dec r12",
            "jnz 2b",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            $store,
            ".endr",
            $end,
            spins = const SPINS,
            nanosleep = const libc::SYS_nanosleep,
            in("r8") $pattern,
            in("r9") $found,
            in("rdi") &NAP,
            inout("r12") NAPS => _,
            out("r13") _, out("rax") _, out("rsi") _, out("rcx") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        )
    };
}

/// # Safety
/// The processor has AVX, and the kernel saves its state.
unsafe fn hold_ymm(pattern: &Bank, found: &mut Bank) {
    // SAFETY: both banks are 16 times 32 bytes; the system call reads NAP and keeps r8, r9, rdi, r12 and r13; all that
    // changes is named, and the upper halves, which Rust's code does not use, are left zero.
    unsafe {
        hold!(
            pattern.as_ptr(),
            found.as_mut_ptr(),
            "vmovdqu ymm\\n, [r8 + 32 * \\n]",
            "vmovdqu [r9 + 32 * \\n], ymm\\n",
            "vzeroupper"
        );
    }
}

fn hold_xmm(pattern: &Bank, found: &mut Bank) {
    // SAFETY: as in `hold_ymm`; SSE2 is part of x86-64.
    unsafe {
        hold!(
            pattern.as_ptr(),
            found.as_mut_ptr(),
            "movdqu xmm\\n, [r8 + 32 * \\n]",
            "movdqu [r9 + 32 * \\n], xmm\\n",
            ""
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_registers_go_in_and_come_out() {
        let pattern = pattern(7);
        let mut found = Bank::default();
        hold_xmm(&pattern, &mut found);
        assert_eq!(compare(&pattern, &found, XMM_WIDTH), Ok(()));
        assert!(compare(&pattern, &found, WIDTH).is_err(), "the upper halves were never stored");
        assert_eq!(hold(7), Ok(()));
    }

    #[test]
    fn one_lost_bit_is_named() {
        let (pattern, mut found) = (pattern(1), pattern(1));
        found[11][3] ^= 0x10;
        let what = compare(&pattern, &found, XMM_WIDTH).unwrap_err();
        assert!(what.starts_with(&format!("register {}11 holds", kind())), "{what}");
    }

    #[test]
    fn patterns_differ_between_registers_and_rounds() {
        let one = pattern(1);
        assert!((1..16).all(|n| one[n] != one[n - 1]));
        assert_ne!(one, pattern(2));
    }
}
