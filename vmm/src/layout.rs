//! Every guest address, in one map.
//!
//! In: nothing. Out: constants for boot, ACPI, the buses and the memslots. Holds: no two ranges overlap (checked below,
//! at compile time), and a snapshot's RAM layout is a function of the memory size alone.
//!
//! ```text
//! guest physical                                       I/O ports
//! 0000_0000  ┌──────────────────────────┐              0x060 0x064  i8042 (reset only)
//!       0500 │ GDT                      │              0x070 0x071  real-time clock
//!       6000 │ PVH start_info           │              0x0f4 0x0f5  exit port, control port
//!       7000 │ zero page (boot_params)  │              0x3f8..0x400  COM1
//!       9000 │ page tables, 4 GiB 1:1   │              0x505         panic device
//!     2_0000 │ kernel command line      │              0x600..0x603  ACPI sleep and reset registers
//!     9_fc00 ├──────────────────────────┤ end of low RAM in e820
//!     e_0000 │ ACPI tables              │ reserved in e820
//!     f_f000 │ VM generation id         │
//!     f_fff0 │ reset vector             │
//!    10_0000 ├──────────────────────────┤
//!            │ kernel … … initrd        │
//!  c000_0000 ├──────────────────────────┤ 3 GiB: RAM stops here
//!  d000_0000 │ virtio-mmio              │
//!  fec0_0000 │ IOAPIC                   │
//!  fee0_0000 │ local APICs              │
//!  fffb_c000 │ KVM identity map, TSS    │
//! 1_0000_0000├──────────────────────────┤ 4 GiB: RAM goes on here
//!            └──────────────────────────┘
//! ```

/// Bytes in a guest page.
pub const PAGE_SIZE: u64 = 4096;
/// Four entries that boot code and the 64-bit boot protocol load.
pub const GDT: u64 = 0x500;
/// `hvm_start_info`, its module list and its memory map, for PVH.
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params`, for the 64-bit Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, PDPT and four page directories that map the first 4 GiB one to one with 2 MiB pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Bytes of page tables: six pages.
pub const PAGE_TABLES_SIZE: u64 = 6 * PAGE_SIZE;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line, its NUL included (x86 `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: u64 = 2048;
/// Where conventional memory ends in the e820 map.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The RSDP, followed by the other ACPI tables; firmware is searched for it here.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// The 16 bytes of the VM generation id. What lies before is for the ACPI tables.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where a processor starts after reset, in real mode at F000:FFF0, and where a kernel that restarts through the BIOS jumps.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// One past the last byte of the area that ACPI tables, generation id and reset vector take.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where a kernel is loaded, unless it says otherwise.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Bytes for each virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Most virtio devices of a machine: one for each interrupt line that is left.
pub const VIRTIO_SLOTS: usize = VIRTIO_GSIS.len();
/// Lines of the I/O APIC that nothing else has. From 16 on no PIC is wired to them.
const VIRTIO_GSIS: [u32; 14] = [16, 17, 18, 19, 20, 21, 22, 23, 10, 11, 12, 13, 14, 15];
/// The I/O APIC (82093AA, as KVM places it).
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// RAM goes on here after the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// i8042 command and status port; the device also answers at [`I8042_DATA`].
pub const I8042_COMMAND: u16 = 0x64;
/// i8042 data port.
pub const I8042_DATA: u16 = 0x60;
/// The real-time clock's index port; the data port follows it.
pub const RTC: u16 = 0x70;
/// Number of its ports.
pub const RTC_LEN: u16 = 2;
/// A byte written here ends the VM, and is the process's exit status.
pub const EXIT_PORT: u16 = 0xf4;
/// Number of its ports: the control port follows it.
pub const EXIT_PORT_LEN: u16 = 2;
/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Number of 8250 registers.
pub const COM1_LEN: u16 = 8;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;
/// The ACPI generic event device's interrupt line, by which the guest hears of a new generation id.
pub const GED_IRQ: u32 = 9;
/// The panic device's one port, where QEMU has it.
pub const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers, one byte each in this order.
pub const ACPI_PM: u16 = 0x600;
/// Number of those registers.
pub const ACPI_PM_LEN: u16 = 3;
/// The reset register's offset among them.
pub const ACPI_PM_RESET: u16 = 2;

/// Fewest and most vCPUs of a machine.
pub const VCPUS: std::ops::RangeInclusive<u32> = 1..=16;

const _: () = {
    assert!(GDT + 0x40 <= PVH_START_INFO);
    assert!(PVH_START_INFO + PAGE_SIZE <= ZERO_PAGE);
    assert!(ZERO_PAGE + PAGE_SIZE <= PAGE_TABLES);
    assert!(PAGE_TABLES + PAGE_TABLES_SIZE <= CMDLINE);
    assert!(CMDLINE + CMDLINE_MAX <= LOW_RAM_END);
    assert!(LOW_RAM_END <= ACPI_TABLES && ACPI_TABLES_END <= HIGH_RAM_START);
    assert!(ACPI_TABLES < GENERATION_ID && GENERATION_ID.is_multiple_of(16));
    assert!(GENERATION_ID + devices::GENERATION_LEN as u64 <= RESET_VECTOR);
    assert!(RESET_VECTOR + 16 == ACPI_TABLES_END);
    assert!(MMIO_HOLE_START <= VIRTIO_MMIO);
    assert!(VIRTIO_MMIO + VIRTIO_SLOTS as u64 * VIRTIO_MMIO_SIZE <= IOAPIC);
    assert!(IOAPIC + PAGE_SIZE <= LOCAL_APIC && LOCAL_APIC + PAGE_SIZE <= KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE_SIZE <= KVM_TSS && KVM_TSS + 3 * PAGE_SIZE <= MMIO_HOLE_END);
};

/// Guest physical address of a virtio device's window. `slot` is below [`VIRTIO_SLOTS`].
pub fn virtio_window(slot: usize) -> u64 {
    VIRTIO_MMIO + slot as u64 * VIRTIO_MMIO_SIZE
}

/// The interrupt line of a virtio device. `slot` is below [`VIRTIO_SLOTS`].
pub fn virtio_gsi(slot: usize) -> u32 {
    VIRTIO_GSIS[slot]
}

/// The RAM ranges of a machine with `memory` bytes, as (guest physical address, bytes): one range up to 3 GiB, and what
/// is more from 4 GiB on.
pub fn ram_ranges(memory: u64) -> Vec<(u64, u64)> {
    let low = memory.min(MMIO_HOLE_START);
    let high = memory - low;
    let mut ranges = vec![(0, low)];
    if high > 0 {
        ranges.push((MMIO_HOLE_END, high));
    }
    ranges
}
