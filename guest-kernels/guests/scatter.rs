//! `scatter`: has much memory in use, and works with a part of it that is scattered.
//!
//! Parameters: `size=<MiB>` (64) of RAM from 16 MiB on, all of which is filled; `every=<n>` (8): of n blocks of 64 KiB one is read in
//! each round; `rate=<rounds per second>` (20).
//! A round reads its blocks in a scattered order and checks every page of them. Prints `scatter round=<n> ok`, for ever; ends
//! with `FAIL …`, status 1.
#![no_std]
#![no_main]

mod rt;

use rt::{apic, params, trap};

const START: usize = 16 << 20;
const PAGE_WORDS: usize = 512;
const BLOCK_PAGES: usize = 16;
/// A prime, which is longer than any number of blocks: a step that visits every block.
const STRIDE: usize = 104_729;

/// The word at a place, which is another for each.
fn word(page: usize, at: usize) -> u64 {
    ((page << 9 | at) as u64 ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn page(number: usize) -> *mut [u64; PAGE_WORDS] {
    (START + number * 4096) as *mut _
}

fn fill(number: usize) {
    // SAFETY: `guest_main` has checked that this is RAM, and nothing else is there.
    let words = unsafe { &mut *page(number) };
    words.iter_mut().enumerate().for_each(|(at, place)| *place = word(number, at));
}

fn check(number: usize) {
    // SAFETY: as above.
    let words = unsafe { &*page(number) };
    for at in [0, PAGE_WORDS - 1] {
        if words[at] != word(number, at) {
            fail!("scatter page {number} word {at}: {:#x}", words[at]);
        }
    }
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let (size, every) = (params::number("size", 64), params::number("every", 8).max(1) as usize);
    let rate = params::number("rate", 20).clamp(1, 1000);
    if START as u64 + (size << 20) > params::ram_end() {
        fail!("scatter size={size} MiB: there is not so much RAM from 16 MiB on");
    }
    let pages = (size << 8) as usize;
    (0..pages).for_each(fill);
    let used = pages / BLOCK_PAGES / every;
    apic::periodic((u64::from(apic::HZ) / rate) as u32);
    for round in 0_u64.. {
        for step in 0..used {
            let block = step * STRIDE % used * every;
            (block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES).for_each(check);
        }
        say!("scatter round={round} ok");
        trap::halt();
    }
    unreachable!()
}
