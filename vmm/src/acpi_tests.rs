//! Reads the tables as a guest does: from the RSDP on, with offsets from the specification and none from the crate that
//! wrote them.

use super::*;
use devices::{AcpiPm, BusDevice, Request};

/// Guest memory from the RSDP on.
struct Guest(Vec<u8>);

impl Guest {
    fn new(vcpus: u32) -> Self {
        Self(tables(vcpus, 2))
    }

    fn at(&self, address: u64, len: usize) -> &[u8] {
        let start = (address - layout::ACPI_TABLES) as usize;
        &self.0[start..start + len]
    }

    /// The table at `address`, all of it, with its checksum checked.
    fn table(&self, address: u64) -> &[u8] {
        let table = self.at(address, u32_at(self.at(address, 8), 4) as usize);
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn xsdt(&self) -> &[u8] {
        self.table(u64_at(self.at(RSDP, 36), 24))
    }

    fn find(&self, signature: &[u8; 4]) -> &[u8] {
        let entries = self.xsdt()[36..].chunks_exact(8);
        let tables = entries.map(|entry| self.table(u64_at(entry, 0)));
        tables.into_iter().find(|table| table.starts_with(signature)).expect("a table of that name")
    }

    fn dsdt(&self) -> &[u8] {
        self.table(u64_at(self.find(b"FACP"), 140))
    }

    /// The MADT's structures: type, and what follows type and length.
    fn interrupt_controllers(&self) -> Vec<(u8, Vec<u8>)> {
        let (mut rest, mut found) = (&self.find(b"APIC")[44..], Vec::new());
        while let [kind, len, ..] = *rest {
            let (this, next) = rest.split_at(len.into());
            found.push((kind, this[2..].to_vec()));
            rest = next;
        }
        found
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn has(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_rsdp_is_where_firmware_is_searched() {
    let guest = Guest::new(1);
    let rsdp = guest.at(RSDP, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    assert_eq!((rsdp[15], u32_at(rsdp, 20)), (2, 36));
    assert_eq!(RSDP % 16, 0);
    assert!((0xe_0000..0x10_0000).contains(&RSDP));
}

#[test]
fn the_xsdt_lists_fadt_and_madt() {
    let guest = Guest::new(2);
    assert!(guest.xsdt().starts_with(b"XSDT"));
    assert_eq!(guest.find(b"FACP").len(), 276);
    assert_eq!(guest.find(b"APIC").len(), 44 + 2 * 8 + 12 + 6);
    assert!(guest.dsdt().starts_with(b"DSDT"));
}

#[test]
fn the_largest_machine_fits() {
    let end = layout::ACPI_TABLES + tables(*layout::VCPUS.end(), layout::VIRTIO_SLOTS).len() as u64;
    assert!(end <= layout::GENERATION_ID, "{end:#x}");
}

#[test]
fn each_vcpu_has_a_local_apic_with_its_index() {
    for vcpus in layout::VCPUS {
        let controllers = Guest::new(vcpus).interrupt_controllers();
        let local: Vec<_> = controllers.iter().filter(|(kind, _)| *kind == 0).map(|(_, apic)| apic).collect();
        assert_eq!(local.len(), vcpus as usize);
        for (id, apic) in local.into_iter().enumerate() {
            assert_eq!(apic[..], [id as u8, id as u8, 1, 0, 0, 0], "UID, APIC id, enabled");
        }
    }
}

#[test]
fn one_ioapic_serves_all_lines_and_lint1_is_nmi() {
    let guest = Guest::new(1);
    assert_eq!(u64::from(u32_at(guest.find(b"APIC"), 36)), layout::LOCAL_APIC);
    let controllers = guest.interrupt_controllers();
    let [(0, _), (1, ioapic), (4, nmi)] = &controllers[..] else { panic!("{controllers:?}") };
    assert_eq!(u64::from(u32_at(ioapic, 2)), layout::IOAPIC);
    assert_eq!(u32_at(ioapic, 6), 0, "first interrupt line");
    assert_eq!(nmi[..], [0xff, 0, 0, 1]);
}

/// A generic address structure: its port, after a check that it is a byte in I/O space.
fn port(fadt: &[u8], offset: usize) -> u64 {
    assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1], "system I/O, 8 bits from 0, byte access");
    u64_at(fadt, offset + 4)
}

#[test]
fn the_registers_of_the_fadt_are_those_of_the_device() {
    let guest = Guest::new(1);
    let fadt = guest.find(b"FACP");
    let base = u64::from(layout::ACPI_PM);
    let offset = |at| {
        let port = port(fadt, at);
        assert!((base..base + u64::from(layout::ACPI_PM_LEN)).contains(&port));
        port - base
    };
    let (reset, control, status) = (offset(116), offset(244), offset(256));
    assert_eq!(AcpiPm.write(reset, &[fadt[128]]), Some(Request::Reset));
    let mut woken = [0xff];
    AcpiPm.read(status, &mut woken);
    assert_eq!(woken, [0]);
    let s5 = guest.dsdt().windows(4).position(|name| name == b"_S5_").expect("soft off") + 4;
    let [0x12, _, 4, 0x0a, sleep_type] = guest.dsdt()[s5..s5 + 5] else { panic!("package of four bytes") };
    assert_eq!(AcpiPm.write(control, &[sleep_type << 2 | 1 << 5]), Some(Request::PowerOff));
}

#[test]
fn the_fadt_says_what_is_not_there() {
    let guest = Guest::new(1);
    let fadt = guest.find(b"FACP");
    let flags = u32_at(fadt, 112);
    assert_eq!((flags >> 20 & 1, flags >> 10 & 1), (1, 1), "hardware-reduced; reset register");
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b100, "no VGA, no i8042; a CMOS RTC");
    assert_eq!((u32_at(fadt, 40), u32_at(fadt, 76)), (0, 0), "no 32-bit DSDT, no PM timer");
}

#[test]
fn the_dsdt_has_com1_and_the_panic_device_where_the_layout_has_them() {
    let guest = Guest::new(1);
    let dsdt = guest.dsdt();
    assert!(has(dsdt, b"COM1") && has(dsdt, &[0x41, 0xd0, 0x05, 0x01]), "PNP0501");
    assert!(has(dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]), "ports");
    assert!(
        has(dsdt, &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]),
        "consumer, edge, active high, exclusive, line 4"
    );
    assert!(has(dsdt, b"QEMU0001\0") && has(dsdt, &[0x47, 1, 5, 5, 5, 5, 1, 1]));
}

#[test]
fn the_dsdt_has_each_virtio_window_with_its_line() {
    let guest = Guest::new(1);
    let dsdt = guest.dsdt();
    for (name, base, line) in [(b"VR00", 0xd000_0000u32, 16u32), (b"VR01", 0xd000_1000, 17)] {
        let window = [&[0x86, 9, 0, 1][..], &base.to_le_bytes(), &0x1000u32.to_le_bytes()].concat();
        let line = [&[0x89, 6, 0, 0b0011, 1][..], &line.to_le_bytes()].concat();
        assert!(has(dsdt, name) && has(dsdt, &window) && has(dsdt, &line), "{}", name.escape_ascii());
    }
    assert!(has(dsdt, b"LNRO0005\0") && !has(dsdt, b"VR02"));
}

#[test]
fn the_clock_is_where_the_layout_has_it_and_has_a_century() {
    let guest = Guest::new(1);
    let ports = [0x47, 1, 0x70, 0, 0x70, 0, 1, 2];
    assert!(has(guest.dsdt(), &[0x41, 0xd0, 0x0b, 0x00]) && has(guest.dsdt(), &ports), "PNP0B00");
    assert_eq!(guest.find(b"FACP")[108], 0x32);
}

#[test]
fn a_new_generation_id_is_an_event() {
    let guest = Guest::new(1);
    let dsdt = guest.dsdt();
    assert!(has(dsdt, b"_HID\x0dVMGENCTR\0") && has(dsdt, b"_CID\x0dVM_Gen_Counter\0"));
    assert!(has(dsdt, b"ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x00"), "a package: 0xff000 and 0");
    assert!(has(dsdt, b"_HID\x0dACPI0013\0"));
    let line = [0x89, 6, 0, 0b0011, 1, 9, 0, 0, 0];
    assert!(has(dsdt, &line), "consumer, edge, active high, exclusive, line 9");
    assert!(has(dsdt, b"\x93\x68\x0a\x09\x86\\\x2e_SB_VGEN\x0a\x80"), "If Arg0 == 9, Notify(VGEN, 0x80)");
}
