//! The state in which a CPU starts a kernel.
//!
//! In: an [`Entry`], and the state that KVM gives a new vCPU. Out: that state, edited; the GDT and the page tables in
//! guest RAM that it refers to. Holds: only what a boot protocol or the field's practice asks for is changed.

use super::{BootError, Entry};
use crate::kernel::Protocol;
use crate::layout;
use devices::Memory;
use kvm_bindings::{kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs2};

// Intel SDM volume 3, 2.5 "Control registers", 2.2.1 "Extended feature enable register".
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

// SDM volume 3, 3.4.5 "Segment descriptors".
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;
/// `__BOOT_CS` and `__BOOT_DS` of the 64-bit boot protocol; PVH leaves the selectors open.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const GDT_ENTRIES: usize = 4;

// SDM volume 3, 4.5 "4-level paging".
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 1 << 7;
const TABLE_ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;

// SDM volume 3, 11.5.1 "Local vector table".
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTINT: u32 = 0x700;
const MASKED: u32 = 1 << 16;

/// Model-specific registers as firmware leaves them, index and value, for every vCPU (SDM volume 4).
pub const BOOT_MSRS: [(u32, u64); 9] = [
    (0x174, 0),           // IA32_SYSENTER_CS
    (0x175, 0),           // IA32_SYSENTER_ESP
    (0x176, 0),           // IA32_SYSENTER_EIP
    (0xc000_0081, 0),     // STAR
    (0xc000_0082, 0),     // LSTAR
    (0xc000_0083, 0),     // CSTAR
    (0xc000_0084, 0),     // SYSCALL_MASK
    (0xc000_0102, 0),     // KERNEL_GS_BASE
    (0x2ff, 1 << 11 | 6), // IA32_MTRR_DEF_TYPE: enabled, write-back
];

/// IA32_MISC_ENABLE. What KVM sets in it tells of facilities that it lacks, so only [`FAST_STRINGS`] is added.
pub const MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE: fast string operations.
pub const FAST_STRINGS: u64 = 1 << 0;

/// [`BOOT_MSRS`] as `KVM_SET_MSRS` takes them.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    BOOT_MSRS.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect()
}

/// The boot CPU's general registers.
pub fn registers(entry: &Entry) -> kvm_regs {
    let regs = kvm_regs { rip: entry.rip, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => kvm_regs { rsi: layout::ZERO_PAGE, ..regs },
        Protocol::Pvh => kvm_regs { rbx: layout::PVH_START_INFO, ..regs },
    }
}

/// Changes a new vCPU's segments and control registers to what the boot CPU starts with.
pub fn configure_sregs(entry: &Entry, sregs: &mut kvm_sregs2) {
    let long = entry.protocol == Protocol::Linux64;
    let (code, data) = (code_segment(long), data_segment());
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss_segment();
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: GDT_ENTRIES as u16 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET | if long { CR0_PG } else { 0 };
    sregs.cr3 = if long { layout::PAGE_TABLES } else { 0 };
    sregs.cr4 = if long { CR4_PAE } else { 0 };
    sregs.efer = if long { EFER_LME | EFER_LMA } else { 0 };
}

/// Routes the legacy PIC (LINT0, ExtINT) and NMIs (LINT1) as the MultiProcessor specification's virtual wire mode does, with
/// the PIC's line masked: this machine has no use for its PICs, but KVM passes lines 0 to 15 to them as well as to the I/O
/// APIC, and what nobody has programmed would interrupt with vectors from 0 on. Otherwise masks stay as they are.
pub fn configure_lapic(lapic: &mut kvm_lapic_state) {
    set_delivery_mode(lapic, LVT_LINT0, MASKED | DELIVERY_EXTINT);
    set_delivery_mode(lapic, LVT_LINT1, DELIVERY_NMI);
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes: [u8; 4] = std::array::from_fn(|at| lapic.regs[register + at] as u8);
    let value = u32::from_le_bytes(bytes) & !DELIVERY_MODE | mode;
    for (at, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[register + at] = byte as _;
    }
}

/// A flat, present segment of 4 GiB for ring 0.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, s: 1, g: 1, ..Default::default() }
}

fn code_segment(long: bool) -> kvm_segment {
    kvm_segment { l: u8::from(long), db: u8::from(!long), ..flat(CODE_SELECTOR, CODE) }
}

fn data_segment() -> kvm_segment {
    kvm_segment { db: 1, ..flat(DATA_SELECTOR, DATA) }
}

/// The task register as PVH wants it; a TSS that is there is also what VMX asks of any guest.
fn tss_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: TSS_BUSY, present: 1, ..Default::default() }
}

/// The eight bytes from which a CPU would load this segment.
fn descriptor(segment: kvm_segment) -> u64 {
    let bits = |value: u8, at: u32| u64::from(value) << at;
    let limit = u64::from(segment.limit >> if segment.g == 1 { 12 } else { 0 });
    let flags = bits(segment.l, 53) | bits(segment.db, 54) | bits(segment.g, 55);
    let access =
        bits(segment.type_, 40) | bits(segment.s, 44) | bits(segment.dpl, 45) | bits(segment.present, 47);
    let base = (segment.base & 0xff_ffff) << 16 | (segment.base >> 24 & 0xff) << 56;
    limit & 0xffff | (limit >> 16 & 0xf) << 48 | flags | access | base
}

/// Writes two null descriptors, code and data at [`layout::GDT`].
pub(super) fn write_gdt(mem: &Memory, protocol: Protocol) -> Result<(), BootError> {
    let code = code_segment(protocol == Protocol::Linux64);
    let gdt: [u64; GDT_ENTRIES] = [0, 0, descriptor(code), descriptor(data_segment())];
    super::write(mem, "the GDT", layout::GDT, &words(gdt.into_iter()))
}

/// Writes page tables that map the first 4 GiB one to one with 2 MiB pages: one PML4, one PDPT, four directories.
pub(super) fn write_page_tables(mem: &Memory) -> Result<(), BootError> {
    let [pml4, pdpt, directories] = [0, 1, 2].map(|page| layout::PAGE_TABLES + page * layout::PAGE_SIZE);
    let pdpt_entries = (0..4).map(|index| (directories + index * layout::PAGE_SIZE) | PRESENT_WRITABLE);
    let pages = (0..4 * TABLE_ENTRIES).map(|page| (page * LARGE_PAGE) | PRESENT_WRITABLE | LARGE);
    super::write(mem, "the PML4", pml4, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    super::write(mem, "the PDPT", pdpt, &words(pdpt_entries))?;
    super::write(mem, "the page directories", directories, &words(pages))
}

fn words(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests;
