//! Puts a guest into RAM as a firmware would hand it over, and says with which registers its boot CPU starts.
//!
//! In: zero-filled RAM, a [`BootSource`], ACPI tables. Out: RAM with kernel, initrd, command line, memory map, GDT and
//! page tables at the addresses of [`layout`], and a [`Boot`]. Holds: all that a guest finds is a function of these
//! inputs alone; a boot that is refused has started nothing.

mod linux64;
mod pvh;
pub mod registers;

use crate::kernel::{self, Initrd, KernelError, KernelIdentity, Protocol, ProtocolChoice};
use crate::layout;
use devices::Memory;
use std::path::PathBuf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// What is to be booted.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// A bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, without a NUL.
    pub cmdline: String,
    /// How an ELF kernel is entered.
    pub protocol: ProtocolChoice,
    /// What is in the memory map beside RAM, as (guest physical address, bytes): not to be touched by who doesn't know it.
    pub reserved: Vec<(u64, u64)>,
}

/// Where and how the boot CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical (and, paging or not, linear) address of the first instruction.
    pub rip: u64,
    /// Which registers the kernel expects.
    pub protocol: Protocol,
}

/// A guest in RAM.
#[derive(Clone, Debug)]
pub struct Boot {
    /// Where it starts.
    pub entry: Entry,
    /// Who it is.
    pub identity: KernelIdentity,
}

/// Why a guest was not booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel or the initrd.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The command line does not fit.
    #[error("the command line has {len} bytes; at most {max} are possible")]
    CmdlineTooLong {
        /// Its bytes.
        len: usize,
        /// What the kernel takes, without the NUL.
        max: usize,
    },
    /// The command line has a character that the kernel could not read.
    #[error("the command line has {found:?} at byte {at}; expected printable ASCII")]
    CmdlineCharacter {
        /// The character.
        found: char,
        /// Where it is.
        at: usize,
    },
    /// The ACPI tables do not fit.
    #[error("the ACPI tables have {len} bytes; at most {max} fit")]
    AcpiTooLarge {
        /// Their bytes.
        len: usize,
        /// Bytes between their place and the generation id's.
        max: u64,
    },
    /// There is no RAM where the guest's data has to go.
    #[error("cannot write {what} to guest RAM")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Why it could not be.
        source: GuestMemoryError,
    },
}

/// What a range of the memory map is, with the numbers that e820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// What both protocols tell the kernel.
struct Handover {
    cmdline_len: usize,
    initrd: Option<Initrd>,
    /// Guest physical address of the RSDP, 0 if there is none.
    rsdp: u64,
    map: Vec<Range>,
}

/// Loads all of `source` and `acpi` (a blob that begins with the RSDP, made for [`layout::ACPI_TABLES`]; may be empty)
/// into `mem`, which has `memory` bytes of RAM at [`layout::ram_ranges`], all zero.
///
/// # Errors
/// Files that are missing, no kernels, or too large; a command line or tables that do not fit.
pub fn load(mem: &Memory, source: &BootSource, memory: u64, acpi: &[u8]) -> Result<Boot, BootError> {
    let ram = memory.min(layout::MMIO_HOLE_START);
    let kernel = kernel::load(mem, &source.kernel, source.protocol, ram)?;
    let initrd =
        source.initrd.as_ref().map(|path| kernel::load_initrd(mem, path, &kernel, ram)).transpose()?;
    let cmdline_max = kernel.header.map_or(u32::MAX, |header| header.cmdline_size);
    let cmdline_len = write_cmdline(mem, &source.cmdline, cmdline_max)?;
    let rsdp = write_acpi(mem, acpi)?;
    write_reset_vector(mem)?;
    let handover = Handover { cmdline_len, initrd, rsdp, map: memory_map(memory, &source.reserved) };
    match kernel.protocol {
        Protocol::Linux64 => linux64::write(mem, kernel.header, &handover)?,
        Protocol::Pvh => pvh::write(mem, &handover)?,
    }
    registers::write_gdt(mem, kernel.protocol)?;
    registers::write_page_tables(mem)?;
    let entry = Entry { rip: kernel.entry, protocol: kernel.protocol };
    Ok(Boot { entry, identity: kernel.identity })
}

/// The memory map of a machine with `memory` bytes of RAM, in ascending order, and what is reserved above it.
pub fn memory_map(memory: u64, reserved: &[(u64, u64)]) -> Vec<Range> {
    let ram = |start, end: u64| Range { start, size: end.saturating_sub(start), kind: RangeKind::Ram };
    let (acpi, acpi_end) = (layout::ACPI_TABLES, layout::ACPI_TABLES_END);
    let mut map = vec![
        ram(0, layout::LOW_RAM_END.min(memory)),
        Range { start: acpi, size: acpi_end - acpi, kind: RangeKind::Reserved },
        ram(layout::HIGH_RAM_START, memory.min(layout::MMIO_HOLE_START)),
    ];
    let high = layout::ram_ranges(memory).into_iter().skip(1);
    map.extend(high.map(|(start, size)| ram(start, start + size)));
    map.extend(reserved.iter().map(|&(start, size)| Range { start, size, kind: RangeKind::Reserved }));
    map.retain(|range| range.size > 0);
    map
}

/// Writes the command line and its NUL; `kernel_max` is the longest that the kernel reads. Returns the length.
fn write_cmdline(mem: &Memory, cmdline: &str, kernel_max: u32) -> Result<usize, BootError> {
    let (len, max) = (cmdline.len(), (layout::CMDLINE_MAX as usize - 1).min(kernel_max as usize));
    if len > max {
        return Err(BootError::CmdlineTooLong { len, max });
    }
    if let Some((at, found)) = cmdline.char_indices().find(|(_, c)| !matches!(c, ' '..='~' | '\t')) {
        return Err(BootError::CmdlineCharacter { found, at });
    }
    write(mem, "the command line", layout::CMDLINE, cmdline.as_bytes())?;
    write(mem, "the command line", layout::CMDLINE + len as u64, &[0])?;
    Ok(len)
}

/// Writes the ACPI tables and returns the RSDP's address, or 0 if there are none.
fn write_acpi(mem: &Memory, acpi: &[u8]) -> Result<u64, BootError> {
    let (len, max) = (acpi.len(), layout::GENERATION_ID - layout::ACPI_TABLES);
    if len as u64 > max {
        return Err(BootError::AcpiTooLarge { len, max });
    }
    write(mem, "the ACPI tables", layout::ACPI_TABLES, acpi)?;
    Ok(if acpi.is_empty() { 0 } else { layout::ACPI_TABLES })
}

/// What a firmware has at the reset vector: the way to a reset. Linux takes it where ACPI is hardware-reduced, since it
/// trusts nothing but EFI to reset such a machine (`efi_reboot_required`), and falls back to the BIOS without EFI.
fn write_reset_vector(mem: &Memory) -> Result<(), BootError> {
    let [low, high] = (layout::ACPI_PM + layout::ACPI_PM_RESET).to_le_bytes();
    // mov dx, the reset register · mov al, value · out dx, al · hlt · jmp to the hlt
    let code = [0xba, low, high, 0xb0, devices::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    write(mem, "the reset vector", layout::RESET_VECTOR, &code)
}

fn write(mem: &Memory, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Memory { what, source })
}

#[cfg(test)]
mod tests;
