//! The boot CPU's state, against the manuals' numbers.

use super::*;
use crate::kernel::synthetic::{MIB, ram};
use vm_memory::{Bytes, GuestAddress};

fn entry(protocol: Protocol) -> Entry {
    Entry { rip: 0x10_0200, protocol }
}

#[test]
fn long_mode_has_flat_segments_paging_and_the_zero_page() {
    let mut sregs = kvm_sregs2::default();
    configure_sregs(&entry(Protocol::Linux64), &mut sregs);
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.ds.selector), (0x10, 1, 0, 0x18));
    assert_eq!(sregs.cr3, layout::PAGE_TABLES);
    assert_eq!(registers(&entry(Protocol::Linux64)).rsi, layout::ZERO_PAGE);
}

#[test]
fn pvh_has_32_bit_segments_no_paging_and_the_start_info() {
    let mut sregs = kvm_sregs2 { cr0: 0x6000_0010, ..Default::default() };
    configure_sregs(&entry(Protocol::Pvh), &mut sregs);
    assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.tr.limit), (0, 1, 0x67));
    let regs = registers(&entry(Protocol::Pvh));
    assert_eq!((regs.rbx, regs.rip, regs.rflags), (layout::PVH_START_INFO, 0x10_0200, 2));
}

#[test]
fn gdt_descriptors_are_the_flat_ones() {
    let mem = ram(MIB);
    let gdt = || mem.read_obj::<[u64; 4]>(GuestAddress(layout::GDT)).unwrap();
    write_gdt(&mem, Protocol::Linux64).unwrap();
    assert_eq!(gdt(), [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    write_gdt(&mem, Protocol::Pvh).unwrap();
    assert_eq!(gdt()[2], 0x00cf_9b00_0000_ffff);
}

#[test]
fn page_tables_map_four_gib_one_to_one() {
    let mem = ram(MIB);
    write_page_tables(&mem).unwrap();
    let read = |table: u64, index: u64| mem.read_obj::<u64>(GuestAddress(table + 8 * index)).unwrap();
    for address in [0, 0x20_0000, 0xbfff_ffff, layout::LOCAL_APIC, 0xffff_ffff] {
        let pdpt = read(layout::PAGE_TABLES, address >> 39) & !0xfff;
        let directory = read(pdpt, address >> 30) & !0xfff;
        let page = read(directory, address >> 21 & 511);
        assert_eq!((page & !0xfff, page & 0xfff), (address & !0x1f_ffff, 0x83));
    }
    assert_eq!(read(layout::PAGE_TABLES, 1), 0);
}

#[test]
fn lapic_masks_the_pic_and_keeps_vectors() {
    let mut lapic = kvm_lapic_state::default();
    lapic.regs[LVT_LINT1] = 0x55;
    configure_lapic(&mut lapic);
    assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0, 7, 1, 0]);
    assert_eq!(lapic.regs[LVT_LINT1..LVT_LINT1 + 4], [0x55, 4, 0, 0]);
}
