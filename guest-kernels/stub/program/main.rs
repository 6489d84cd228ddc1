//! The stub: checks a snapshot, puts its RAM in place, says so, and hands over.
//!
//! In: the file in memory, zeroed RAM, parameters. Out: RAM as it was, and what was seen of the file, in the parameters; or a
//! line that says which check failed and where. Holds: every byte of the file is hostile until checked; what is digested is
//! what has arrived in RAM, so that a file which changes meanwhile deceives nobody.
#![no_std]
#![no_main]

#[path = "../src/abi.rs"]
#[allow(dead_code, reason = "some is the monitor's")]
mod abi;
#[path = "../../guests/rt/memory.rs"]
#[allow(dead_code, reason = "shared with the bare-metal guests")]
mod memory;
mod overlay;
mod ports;

use core::panic::PanicInfo;
use core::slice;
use overlay::{Overlay, Pages, Report};
use ports::{control, say};
use snapshot_format::{Fault, Image, RamRange};

#[unsafe(no_mangle)]
extern "C" fn stub_start() -> ! {
    let word = match restore() {
        Ok(Report { runs, pages, zero_pages, digest }) => {
            say!("stub: runs={runs} pages={pages} zero_pages={zero_pages} digest={digest:016x} go");
            abi::GO
        }
        Err(fault) => {
            say!("{fault}");
            abi::REFUSED
        }
    };
    loop {
        control(word);
    }
}

fn restore() -> Result<Report, Fault> {
    let len = parameter(abi::IMAGE_LEN);
    // SAFETY: the monitor has mapped the file there, and nothing writes it through this mapping. Another process may write
    // the file; then bytes are read that some check or other refuses, or that are right.
    let file = unsafe { slice::from_raw_parts(abi::IMAGE as *const u8, len as usize) };
    let image = Image::check(file)?;
    let ranges = image.outline.ranges();
    tell(image.notes.header_bytes, ranges);
    control(abi::WANT_RAM);
    let mut overlay = Overlay::new(file, &image, holes(len));
    for mapped in image.layout.ram() {
        let RamRange { gpa, len } = mapped.range;
        // SAFETY: the monitor has answered the last word with RAM at each of the ranges, zeroed; the ranges are disjoint.
        let ram = unsafe { slice::from_raw_parts_mut((abi::RAM + gpa) as *mut u8, len as usize) };
        overlay.range(mapped, ram)?;
    }
    let report @ Report { runs, pages, zero_pages, digest } = overlay.report();
    let told = [(abi::RUNS, runs), (abi::PAGES, pages), (abi::ZERO_PAGES, zero_pages), (abi::DIGEST, digest)];
    told.into_iter().for_each(|(word, value)| set_parameter(word, value));
    Ok(report)
}

/// Whole pages of the file, which the monitor may have copied to where to read them costs less.
fn read_image<'a>(start: u64, len: u64) -> &'a [u8] {
    set_parameter(abi::NEAR_START, start);
    set_parameter(abi::NEAR_LEN, len);
    control(abi::READ_IMAGE);
    // SAFETY: the monitor has said that so many bytes are there. It leaves them alone until the part after the next is asked for, and
    // no chunk is kept for so long.
    unsafe { slice::from_raw_parts(parameter(abi::IMAGE_AT) as *const u8, len as usize) }
}

/// Tells it which pages of RAM will be written after what was told before.
fn near_ram(start: u64, pages: &Pages) {
    set_parameter(abi::NEAR_START, start);
    pages.iter().enumerate().for_each(|(word, bits)| set_parameter(abi::NEAR_PAGES + word, *bits));
    control(abi::NEAR_RAM);
}

/// Tells the monitor what was seen.
fn tell(header: &[u8], ranges: &[RamRange]) {
    for (word, bytes) in (abi::HEADER..).zip(header.chunks(8)) {
        set_parameter(word, bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    }
    set_parameter(abi::RANGE_COUNT, ranges.len() as u64);
    for (index, range) in ranges.iter().enumerate() {
        set_parameter(abi::RANGES + 2 * index, range.gpa);
        set_parameter(abi::RANGES + 2 * index + 1, range.len);
    }
}

/// The map of holes, a bit for each page of a file of this length.
fn holes(len: u64) -> &'static [u8] {
    let bytes = len.div_ceil(snapshot_format::PAGE_SIZE).div_ceil(8);
    // SAFETY: the monitor has put it there and leaves it alone.
    unsafe { slice::from_raw_parts(parameter(abi::HOLES) as *const u8, bytes as usize) }
}

fn parameter(word: abi::Word) -> u64 {
    // SAFETY: an aligned word of the page of parameters, which is no Rust object.
    unsafe { (abi::PARAMETERS as *const u64).add(word).read_volatile() }
}

fn set_parameter(word: abi::Word, value: u64) {
    // SAFETY: as above.
    unsafe { (abi::PARAMETERS as *mut u64).add(word).write_volatile(value) }
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    say!("{info}");
    loop {
        control(abi::FAILED);
    }
}
