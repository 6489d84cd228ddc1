//! `registers`: holds patterns in all registers that a snapshot has to keep, and looks whether they are still there.
//!
//! Parameters: `spins=<n>` (100000000), how long each round holds them.
//! Prints `registers round=<n> ok set=<sse|avx|avx512>` after each round, for ever; ends with `FAIL …`, status 1.
#![no_std]
#![no_main]

mod rt;

use core::arch::global_asm;
use rt::{cpu, params};

/// Words of a register file: 14 general registers, 8 of x87, 32 vectors of 8 words, 8 masks, MXCSR, x87 control word.
const GENERAL: usize = 14;
const VECTORS: usize = GENERAL + 8;
const MASKS: usize = VECTORS + 32 * 8;
const MXCSR: usize = MASKS + 8;
const WORDS: usize = MXCSR + 2;

static mut WANTED: [u64; WORDS] = [0; WORDS];
static mut FOUND: [u64; WORDS] = [0; WORDS];
static mut STACK: u64 = 0;

/// Rounding towards zero, every exception masked.
const CONTROLS: [u64; 2] = [0x7f80, 0xf7f];

// `fn(spins)`: loads the registers from WANTED, spins, stores them to FOUND. RCX counts and has no pattern, RSP finds the
// way back. General registers are popped and pushed: interrupts have a stack of their own.
macro_rules! hold {
    ($name:literal, $load:literal, $store:literal) => {
        global_asm!(
            concat!(".globl ", $name),
            concat!($name, ":"),
            "push rbx",
            "push rbp",
            "push r12",
            "push r13",
            "push r14",
            "push r15",
            "mov rcx, rdi",
            "ldmxcsr [{wanted} + {mxcsr}]",
            "fldcw word ptr [{wanted} + {mxcsr} + 8]",
            ".irp i, 7, 6, 5, 4, 3, 2, 1, 0",
            "fild qword ptr [{wanted} + {x87} + 8 * \\i]",
            ".endr",
            $load,
            "mov [{stack}], rsp",
            "mov rsp, offset {wanted}",
            ".irp r, rax, rbx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15",
            "pop \\r",
            ".endr",
            "2: dec rcx",
            "jnz 2b",
            "mov rsp, offset {found} + {x87}",
            ".irp r, r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rbx, rax",
            "push \\r",
            ".endr",
            "mov rsp, [{stack}]",
            $store,
            ".irp i, 0, 1, 2, 3, 4, 5, 6, 7",
            "fistp qword ptr [{found} + {x87} + 8 * \\i]",
            ".endr",
            "stmxcsr [{found} + {mxcsr}]",
            "fnstcw word ptr [{found} + {mxcsr} + 8]",
            "fninit",
            "push 0x1f80",
            "ldmxcsr [rsp]",
            "pop rax",
            "pop r15",
            "pop r14",
            "pop r13",
            "pop r12",
            "pop rbp",
            "pop rbx",
            "ret",
            wanted = sym WANTED,
            found = sym FOUND,
            stack = sym STACK,
            x87 = const 8 * GENERAL,
            vectors = const 8 * VECTORS,
            masks = const 8 * MASKS,
            mxcsr = const 8 * MXCSR,
        );
    };
}

hold!(
    "hold_sse",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movups xmm\\i, [{wanted} + {vectors} + 64 * \\i]
    .endr # {masks}",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movups [{found} + {vectors} + 64 * \\i], xmm\\i
    .endr"
);
hold!(
    "hold_avx",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovups ymm\\i, [{wanted} + {vectors} + 64 * \\i]
    .endr # {masks}",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovups [{found} + {vectors} + 64 * \\i], ymm\\i
    .endr
    vzeroupper"
);
hold!(
    "hold_avx512",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7
    kmovq k\\i, [{wanted} + {masks} + 8 * \\i]
    .endr
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovups zmm\\i, [{wanted} + {vectors} + 64 * \\i]
    .endr
    .irp i, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovups zmm\\i, [{wanted} + {vectors} + 64 * \\i]
    .endr",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7
    kmovq [{found} + {masks} + 8 * \\i], k\\i
    .endr
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovups [{found} + {vectors} + 64 * \\i], zmm\\i
    .endr
    .irp i, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovups [{found} + {vectors} + 64 * \\i], zmm\\i
    .endr
    vzeroupper"
);

unsafe extern "C" {
    fn hold_sse(spins: u64);
    fn hold_avx(spins: u64);
    fn hold_avx512(spins: u64);
}

/// A set of registers, by its widest.
struct Set {
    name: &'static str,
    hold: unsafe extern "C" fn(u64),
    vectors: usize,
    words: usize,
    masks: bool,
}

const SSE: Set = Set { name: "sse", hold: hold_sse, vectors: 16, words: 2, masks: false };
const AVX: Set = Set { name: "avx", hold: hold_avx, vectors: 16, words: 4, masks: false };
const AVX512: Set = Set { name: "avx512", hold: hold_avx512, vectors: 32, words: 8, masks: true };

impl Set {
    /// The widest that CPUID offers and XCR0 enables.
    fn widest() -> Self {
        let (xcr0, leaf1, leaf7) = (cpu::xcr0(), cpu::cpuid(1, 0), cpu::cpuid(7, 0));
        let avx = leaf1[2] & 1 << 28 != 0 && xcr0 & 6 == 6;
        let (foundation, words) = (leaf7[1] & 1 << 16 != 0, leaf7[1] & 1 << 30 != 0);
        match (avx, foundation && words && xcr0 & 0xe6 == 0xe6) {
            (_, true) => AVX512,
            (true, false) => AVX,
            (false, false) => SSE,
        }
    }

    /// Whether the word at `at` is in a register of this set.
    fn has(&self, at: usize) -> bool {
        match at {
            VECTORS..MASKS => (at - VECTORS) / 8 < self.vectors && (at - VECTORS) % 8 < self.words,
            MASKS..MXCSR => self.masks,
            _ => true,
        }
    }
}

/// Word `at` in round `round`: a mix in which each bit depends on all of both (splitmix64).
fn pattern(round: u64, at: usize) -> u64 {
    if at >= MXCSR {
        return CONTROLS[at - MXCSR];
    }
    let mut mix = (round << 16 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mix = (mix ^ mix >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mix = (mix ^ mix >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mix ^ mix >> 31
}

fn round(set: &Set, round: u64, spins: u64) {
    // SAFETY: one CPU, and only `hold` uses these besides this function.
    let (wanted, found) = unsafe { (&mut *(&raw mut WANTED), &mut *(&raw mut FOUND)) };
    for at in 0..WORDS {
        (wanted[at], found[at]) = (pattern(round, at), 0);
    }
    // SAFETY: the set is there, and the function keeps the calling convention.
    unsafe { (set.hold)(spins) };
    for at in (0..WORDS).filter(|&at| set.has(at)) {
        // SAFETY: as above. Volatile, since the assembly has written it behind the compiler's back.
        let (wanted, found) =
            unsafe { ((&raw const wanted[at]).read_volatile(), (&raw const found[at]).read_volatile()) };
        if wanted != found {
            fail!("registers round={round} word {at}: {found:#x}, expected {wanted:#x}");
        }
    }
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let (set, spins) = (Set::widest(), params::number("spins", 100_000_000).max(1));
    let mut number = 0;
    loop {
        round(&set, number, spins);
        say!("registers round={number} ok set={}", set.name);
        number += 1;
    }
}
