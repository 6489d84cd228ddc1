//! The restore stub: a guest program of a few KB that checks a snapshot and puts its RAM in place.
//!
//! In: nothing. Out: the program, and what it and its monitor have agreed on. Holds: the program needs no allocator, no
//! interrupt and no device but a serial port and a control port; it runs in ring 3 from its first instruction.

pub mod abi;

/// The program: to be put at [`abi::BASE`], where it also begins. What follows it in memory has to be zero.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stub.bin"));

// The linker has checked the same with all that the program needs besides.
const _: () = assert!(PROGRAM.len() as u64 <= abi::PROGRAM_MAX);
