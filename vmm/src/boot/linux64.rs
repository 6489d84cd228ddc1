//! The zero page of the 64-bit Linux boot protocol.
//!
//! In: the kernel's setup header, or none for an ELF kernel, and what to hand over. Out: `boot_params` at
//! [`layout::ZERO_PAGE`]. Holds: what only a boot loader may set is set here, whatever the file said.

use super::{BootError, Handover};
use crate::layout;
use devices::Memory;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

// Linux Documentation/arch/x86/boot.rst, "Details of header fields".
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const PROTOCOL_2_15: u16 = 0x020f;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;
const ALIGNMENT: u32 = 0x20_0000;

/// Writes the zero page.
pub(super) fn write(
    mem: &Memory,
    header: Option<setup_header>,
    handover: &Handover,
) -> Result<(), BootError> {
    let mut params = boot_params::zeroed();
    params.hdr = complete(header.unwrap_or_else(elf_header), handover);
    params.acpi_rsdp_addr = handover.rsdp;
    params.e820_entries = handover.map.len() as u8;
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&handover.map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    super::write(mem, "the zero page", layout::ZERO_PAGE, params.as_slice())
}

/// The header of a kernel that brings none.
fn elf_header() -> setup_header {
    let mut header = setup_header::zeroed();
    header.boot_flag = BOOT_FLAG;
    header.header = MAGIC;
    header.version = PROTOCOL_2_15;
    header.loadflags = LOADED_HIGH;
    header.kernel_alignment = ALIGNMENT;
    header
}

/// Fills in what the boot loader has to say.
fn complete(mut header: setup_header, handover: &Handover) -> setup_header {
    header.type_of_loader = LOADER_UNDEFINED;
    header.setup_data = 0;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    if header.cmdline_size == 0 {
        header.cmdline_size = handover.cmdline_len as u32;
    }
    // Below 3 GiB, so 32 bits are enough.
    header.ramdisk_image = handover.initrd.map_or(0, |initrd| initrd.address as u32);
    header.ramdisk_size = handover.initrd.map_or(0, |initrd| initrd.size as u32);
    header
}
