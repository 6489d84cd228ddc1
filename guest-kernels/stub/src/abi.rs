//! What the stub and the monitor have agreed on: addresses, parameters, words through the control port.
//!
//! In: nothing. Out: constants, for the monitor and for the program alike. Holds: all addresses are linear; where in guest
//! physical memory they lead to is the monitor's choice.
//!
//! ```text
//!        20_0000  program, zeroes after it
//!        21_0000  stack
//!        22_0000  parameters, TSS and GDT in the same page
//!        22_1000  page tables, then the map of holes, then copies of parts of the file
//! 1000_0000_0000  guest RAM
//! 2000_0000_0000  the snapshot file, read-only
//! ```

/// Where the program is, and begins.
pub const BASE: u64 = 0x20_0000;
/// Most bytes of the program, its zeroed data included.
pub const PROGRAM_MAX: u64 = 0x1_0000;
/// One past the stack.
pub const STACK_END: u64 = BASE + 0x2_0000;
/// A page of 64-bit words: [`Word`] is an index.
pub const PARAMETERS: u64 = STACK_END;
/// Where the monitor puts a TSS in that page, which opens ports below [`PORTS_END`] to ring 3.
pub const TSS: u64 = PARAMETERS + 0xe00;
/// One past the last port that the stub may use.
pub const PORTS_END: u64 = 0x400;
/// Where the monitor puts its descriptors in that page.
pub const GDT: u64 = PARAMETERS + 0xf00;
/// Where the monitor puts page tables.
pub const TABLES: u64 = PARAMETERS + 0x1000;
/// Guest physical address 0.
pub const RAM: u64 = 0x1000_0000_0000;
/// The first byte of the snapshot file.
pub const IMAGE: u64 = 0x2000_0000_0000;
/// Longest file that there is room for in the address map.
pub const IMAGE_MAX: u64 = 4 << 40;

/// Longest part of the file of which the monitor makes a copy.
pub const STAGED_MAX: u64 = 1 << 20;
/// Copies that are there at a time.
pub const STAGED: u64 = 2;

/// Takes the stub's text, byte for byte.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Takes the words below.
pub const CONTROL_PORT: u16 = 0xf5;

/// All but RAM has been checked: the ranges are in the parameters, give me RAM there.
pub const WANT_RAM: u8 = 1;
/// RAM is in place and checked.
pub const GO: u8 = 2;
/// The snapshot is not to be restored; the last line of text says why.
pub const REFUSED: u8 = 3;
/// The stub itself is at fault; the last line of text says where.
pub const FAILED: u8 = 4;
/// The file will be read from [`NEAR_START`] on, [`NEAR_LEN`] bytes: tell me where, in [`IMAGE_AT`].
pub const READ_IMAGE: u8 = 5;
/// RAM from the guest physical address [`NEAR_START`] on will be written, the pages in [`NEAR_PAGES`], but not yet: something else is
/// done before. A hint as well.
pub const NEAR_RAM: u8 = 6;
/// What was hinted at first with [`NEAR_RAM`], and not asked for since, is written now.
pub const NEAR_NOW: u8 = 7;

/// Index of a parameter.
pub type Word = usize;
/// From the monitor: bytes of the file.
pub const IMAGE_LEN: Word = 0;
/// From the monitor: linear address of the map of holes, one bit for each page of the file; 1: nothing but zeroes is there.
pub const HOLES: Word = 1;
/// From the stub, with a hint: where.
pub const NEAR_START: Word = 12;
/// From the stub, with [`READ_IMAGE`]: bytes, whole pages.
pub const NEAR_LEN: Word = 13;
/// From the monitor, for [`READ_IMAGE`]: the linear address of that part of the file, or of a copy, in which holes need not be zero. It
/// stays as it is until the stub asks for the part after the next: [`STAGED`] are there at a time.
pub const IMAGE_AT: Word = 14;
/// From the stub, with [`NEAR_RAM`]: a bit for each page of a chunk, the lowest first.
pub const NEAR_PAGES: Word = 24;
/// Words of it.
pub const NEAR_PAGES_LEN: usize = 4;
/// From the stub: runs of pages that were copied.
pub const RUNS: Word = 8;
/// From the stub: pages that were copied.
pub const PAGES: Word = 9;
/// From the stub: pages that are zero and were not copied.
pub const ZERO_PAGES: Word = 10;
/// From the stub: XXH3 of the digests of all chunks, each computed from what is in RAM now.
pub const DIGEST: Word = 11;
/// From the stub: the fixed header of the notes, in 6 words, little-endian, zeroes after it.
pub const HEADER: Word = 16;
/// From the stub: number of RAM ranges.
pub const RANGE_COUNT: Word = 31;
/// From the stub: address and length of each.
pub const RANGES: Word = 32;
