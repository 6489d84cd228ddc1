//! Parameters: `key=value` words on the kernel command line.

use super::entry::ENTERED_BY_PVH;
use core::ffi::{CStr, c_char};
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// `hvm_start_info.cmdline_paddr`.
const PVH_CMDLINE: usize = 24;
/// `hvm_start_info.rsdp_paddr`.
const PVH_RSDP: usize = 32;
/// `boot_params.hdr.cmd_line_ptr`.
const ZERO_PAGE_CMDLINE: usize = 0x228;
/// `boot_params.acpi_rsdp_addr`.
const ZERO_PAGE_RSDP: usize = 0x70;

/// `hvm_start_info.memmap_paddr` and `memmap_entries`; an entry's size.
const PVH_MAP: (usize, usize, usize) = (40, 48, 24);
/// `boot_params.e820_table` and `e820_entries`; an entry's size.
const ZERO_PAGE_MAP: (usize, usize, usize) = (0x2d0, 0x1e8, 20);
/// Type of an entry of either map.
const RAM: u32 = 1;

static RAM_END: AtomicUsize = AtomicUsize::new(0);
static CMDLINE: AtomicUsize = AtomicUsize::new(0);
static RSDP: AtomicUsize = AtomicUsize::new(0);

/// Reads the guest physical word at `address`.
pub fn word(address: usize) -> u32 {
    // SAFETY: all memory below 4 GiB is mapped, and what is read is no Rust object.
    unsafe { ptr::read_unaligned(address as *const u32) }
}

pub(super) fn set_source(info: *const u8, entered: u32) {
    let pvh = entered == ENTERED_BY_PVH;
    let (cmdline, rsdp) = if pvh { (PVH_CMDLINE, PVH_RSDP) } else { (ZERO_PAGE_CMDLINE, ZERO_PAGE_RSDP) };
    CMDLINE.store(word(info as usize + cmdline) as usize, Relaxed);
    RSDP.store(word(info as usize + rsdp) as usize, Relaxed);
    let (table, count) = if pvh {
        (word(info as usize + PVH_MAP.0) as usize, word(info as usize + PVH_MAP.1))
    } else {
        (info as usize + ZERO_PAGE_MAP.0, word(info as usize + ZERO_PAGE_MAP.1) & 0xff)
    };
    let size = if pvh { PVH_MAP.2 } else { ZERO_PAGE_MAP.2 };
    let entries = (0..count as usize).map(|index| table + index * size);
    let high = entries.filter(|&entry| word(entry) == 1 << 20 && word(entry + 16) == RAM);
    let end = high.map(|entry| (1 << 20) + word(entry + 8) as usize).max();
    RAM_END.store(end.unwrap_or(0), Relaxed);
}

/// Where the RAM that begins at 1 MiB ends.
pub fn ram_end() -> u64 {
    RAM_END.load(Relaxed) as u64
}

/// Where the ACPI RSDP is; 0 if the machine has none.
pub fn rsdp() -> usize {
    RSDP.load(Relaxed)
}

/// The text of parameter `key`, if it is given.
pub fn text(key: &str) -> Option<&'static str> {
    let cmdline = CMDLINE.load(Relaxed) as *const c_char;
    if cmdline.is_null() {
        return None;
    }
    // SAFETY: the machine has put a NUL at the end, and nobody writes there.
    let words = unsafe { CStr::from_ptr(cmdline) }.to_str().ok()?.split_ascii_whitespace();
    words.filter_map(|word| word.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// The number of parameter `key`, or `default` if it is not given. Anything else than a number ends the VM.
pub fn number(key: &str, default: u64) -> u64 {
    let Some(text) = text(key) else { return default };
    text.parse().unwrap_or_else(|_| crate::fail!("{key}={text} is not a number"))
}
