//! `dirty`: keeps a pattern in memory, dirties pages at a rate, and sees that no write is lost.
//!
//! Parameters: `size=<MiB>` (64) of RAM from 16 MiB on; `rate=<pages per second>` (0: as fast as it can);
//! `lines=<per second>` (5); `verify=0` leaves out the look at every page before each line; `stride=1` rewrites pages in their order.
//! A page has its index, a version, words mixed from both, and a checksum. Pages are rewritten in a scattered order; each
//! is checked before it is overwritten. Prints `dirty round=<n> written=<pages> ok` (a round is every page once), for ever;
//! ends with `FAIL …`, status 1.
#![no_std]
#![no_main]

mod rt;

use rt::{apic, params, trap};

const START: usize = 16 << 20;
const PAGE_WORDS: usize = 512;
const PAGES_PER_MIB: u64 = 256;
/// Timer interrupts per second.
const HZ: u64 = 100;
/// Primes, one of which never divides a machine's number of pages: steps that visit every page.
const STRIDES: [u64; 2] = [7919, 104_729];

struct Memory {
    pages: u64,
    stride: u64,
    /// Pages written since the first round.
    written: u64,
}

impl Memory {
    /// Fills every page with version 0.
    fn new(pages: u64, stride: u64) -> Self {
        (0..pages).for_each(|index| fill(index, 0));
        Self { pages, stride, written: 0 }
    }

    fn round(&self) -> u64 {
        self.written / self.pages
    }

    /// Checks the next page, and gives it the next version.
    fn write_next(&mut self) {
        let (round, step) = (self.round(), self.written % self.pages);
        let index = step * self.stride % self.pages;
        check(index, round);
        fill(index, round + 1);
        self.written += 1;
    }

    /// Checks every page, in the order in which they are written.
    fn verify(&self) {
        let (round, done) = (self.round(), self.written % self.pages);
        for step in 0..self.pages {
            check(step * self.stride % self.pages, if step < done { round + 1 } else { round });
        }
    }
}

fn page(index: u64) -> *mut [u64; PAGE_WORDS] {
    (START + index as usize * 4096) as *mut _
}

/// The words between the first two and the last.
fn mix(index: u64, version: u64, at: usize) -> u64 {
    (index << 32 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at as u64)
}

fn fill(index: u64, version: u64) {
    // SAFETY: `guest_main` has checked that this is RAM, and nothing else is there.
    let words = unsafe { &mut *page(index) };
    (words[0], words[1]) = (index, version);
    for at in 2..PAGE_WORDS - 1 {
        words[at] = mix(index, version, at);
    }
    words[PAGE_WORDS - 1] = checksum(words);
}

fn checksum(words: &[u64; PAGE_WORDS]) -> u64 {
    words[..PAGE_WORDS - 1].iter().fold(0, |sum: u64, word| sum.rotate_left(1) ^ word)
}

fn check(index: u64, version: u64) {
    // SAFETY: as above.
    let words = unsafe { &*page(index) };
    if (words[0], words[1]) != (index, version) {
        fail!("dirty page {index} version {version}: found page {} version {}", words[0], words[1]);
    }
    let pattern = (2..PAGE_WORDS - 1).all(|at| words[at] == mix(index, version, at));
    if !pattern || words[PAGE_WORDS - 1] != checksum(words) {
        fail!("dirty page {index} version {version}: its words are not the pattern");
    }
}

/// From page to page, so that all of them are visited.
fn stride(pages: u64) -> u64 {
    let scattered = STRIDES.into_iter().find(|stride| pages % stride != 0);
    let scattered = scattered.expect("a page count below both primes' product");
    if params::number("stride", scattered) == 1 { 1 } else { scattered }
}

/// Pages of the pattern, if there is RAM for them.
fn pages() -> u64 {
    let size = params::number("size", 64).max(1);
    let room = params::ram_end().saturating_sub(START as u64) >> 20;
    if size > room {
        fail!("dirty size={size} MiB: from 16 MiB on there are {room} MiB");
    }
    size * PAGES_PER_MIB
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let (rate, lines) = (params::number("rate", 0), params::number("lines", 5).clamp(1, HZ));
    let verify = params::number("verify", 1) != 0;
    let pages = pages();
    let mut memory = Memory::new(pages, stride(pages));
    apic::periodic(apic::HZ / HZ as u32);
    let (start, mut next_line) = (trap::ticks(0), HZ / lines);
    loop {
        let ticks = trap::ticks(0) - start;
        if rate == 0 || memory.written < ticks * rate / HZ {
            memory.write_next();
        } else {
            trap::halt();
        }
        if ticks >= next_line {
            if verify {
                memory.verify();
            }
            say!("dirty round={} written={} ok", memory.round(), memory.written);
            next_line = trap::ticks(0) - start + HZ / lines;
        }
    }
}
