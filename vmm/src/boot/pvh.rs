//! The start info of the PVH boot protocol.
//!
//! In: what to hand over. Out: one page at [`layout::PVH_START_INFO`], as below. Holds: all of it fits that page.
//!
//! ```text
//! 0      hvm_start_info
//! 0x40   module list: the initrd, if there is one
//! 0x80   memory map
//! ```

use super::{BootError, Handover};
use crate::layout;
use devices::Memory;
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

const MODULES: u64 = layout::PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x80;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Writes the start info and what it points to.
pub(super) fn write(mem: &Memory, handover: &Handover) -> Result<(), BootError> {
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(handover.initrd.is_some()),
        modlist_paddr: handover.initrd.map_or(0, |_| MODULES),
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: handover.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: handover.map.len() as u32,
        ..Default::default()
    };
    super::write(mem, "the PVH start info", layout::PVH_START_INFO, info.as_slice())?;
    if let Some(initrd) = handover.initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        super::write(mem, "the PVH module list", MODULES, module.as_slice())?;
    }
    write_map(mem, handover)
}

fn write_map(mem: &Memory, handover: &Handover) -> Result<(), BootError> {
    let entry = hvm_memmap_table_entry::default;
    for (address, range) in (MEMORY_MAP..).step_by(size_of_val(&entry())).zip(&handover.map) {
        let (addr, size, type_) = (range.start, range.size, range.kind as u32);
        let entry = hvm_memmap_table_entry { addr, size, type_, ..entry() };
        super::write(mem, "the PVH memory map", address, entry.as_slice())?;
    }
    Ok(())
}
