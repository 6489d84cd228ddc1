//! The restore stub: a guest program of a few KB that checks a snapshot and puts its RAM in place.
//!
//! In: nothing. Out: the program, for three kinds of processor, and what it and its monitor have agreed on. Holds: the
//! program needs no allocator, no interrupt and no device but a serial port and a control port; it runs in ring 3 from its first
//! instruction.

pub mod abi;

/// Vector registers that a program uses beside SSE2's. Most of its work is a digest, which they make faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vectors {
    /// None.
    Sse2,
    /// AVX2's.
    Avx2,
    /// AVX-512F's, and AVX2's.
    Avx512,
}

/// The program: to be put at [`abi::BASE`], where it also begins. What follows it in memory has to be zero.
pub const fn program(vectors: Vectors) -> &'static [u8] {
    match vectors {
        Vectors::Sse2 => include_bytes!(concat!(env!("OUT_DIR"), "/sse2.bin")),
        Vectors::Avx2 => include_bytes!(concat!(env!("OUT_DIR"), "/avx2.bin")),
        Vectors::Avx512 => include_bytes!(concat!(env!("OUT_DIR"), "/avx512.bin")),
    }
}

// The linker has checked the same with all that a program needs besides.
const _: () = {
    assert!(program(Vectors::Sse2).len() as u64 <= abi::PROGRAM_MAX);
    assert!(program(Vectors::Avx2).len() as u64 <= abi::PROGRAM_MAX);
    assert!(program(Vectors::Avx512).len() as u64 <= abi::PROGRAM_MAX);
};
