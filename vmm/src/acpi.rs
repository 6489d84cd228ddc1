//! The ACPI tables that a guest finds.
//!
//! In: the numbers of vCPUs and of virtio devices. Out: the bytes to put at [`RSDP`]. Holds: every address in them is the layout's, every value
//! that a device compares is the device's own, and the whole fits below [`layout::GENERATION_ID`].
//!
//! ```text
//! RSDP ──► XSDT ──┬──► FADT ──► DSDT   COM1, RTC, panic device, VM generation id and its event, virtio devices, \_S5
//!                 └──► MADT            a local APIC per vCPU, the I/O APIC, NMI on LINT1
//! ```
//!
//! # Why hardware-reduced ACPI
//!
//! Full ACPI wants a PM1 event block, a PM timer and an SCI to wire, to save and to restore, of which a guest uses
//! nothing but soft off. Hardware-reduced ACPI (ACPI 6.5, 4.1) does that with three byte registers and no interrupt.
//!
//! Its price is that Linux then leaves the PIT and the two PICs alone (`acpi_generic_reduced_hw_init`: no `timer_init`,
//! no `pre_vector_init`, `null_legacy_pic`), and so goes without the boot-time check of the PIT's interrupt. What takes
//! the PIT's place:
//! - the frequency of the TSC comes from kvmclock, and it is the time source too;
//! - the local APIC's timer needs no calibration where CPUID has the TSC deadline, and elsewhere `calibrate_APIC_clock`
//!   polls the TSC (since Linux 5.4), so a guest without TSC deadline boots as well. It stays usable for high resolution
//!   only if CPUID leaf 6 has ARAT, since there is no other timer to wake an idle CPU; KVM offers that bit everywhere.
//!
//! Without PICs there are no fixed ISA interrupts either: a device's line reaches Linux through its `_CRS` alone. That
//! is why COM1 is in the DSDT, and why the MADT has no interrupt source overrides.

use crate::layout;
use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

/// Where the guest is told to look for the RSDP: the first of the bytes that [`tables`] returns.
pub const RSDP: u64 = layout::ACPI_TABLES;

const OEM_ID: [u8; 6] = *b"VMM   ";
const OEM_TABLE_ID: [u8; 8] = *b"SNAPSHOT";
const OEM_REVISION: u32 = 1;

/// Length of a table header, and of the MADT up to its first structure.
const HEADER_LEN: u32 = 36;
const MADT_LEN: u32 = 44;

/// The I/O APIC's id, as KVM's says it. Local APIC ids begin at 0 too: since the xAPIC the two are counted apart.
const IOAPIC_ID: u8 = 0;

/// FADT, IA-PC boot architecture: don't probe for VGA. (ACPI 6.5, table 5.11.)
const BOOT_NO_VGA: u16 = 1 << 2;

/// Value of a `Notify` by which a VMGenID device says that the id has changed.
const GENERATION_CHANGED: u8 = 0x80;

/// The tables for a machine with `vcpus` processors, a number within [`layout::VCPUS`], and `virtio` devices, at most
/// [`layout::VIRTIO_SLOTS`]. They go to [`RSDP`].
pub fn tables(vcpus: u32, virtio: usize) -> Vec<u8> {
    let mut memory = Tables::default();
    let dsdt = memory.add(&dsdt(virtio));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(memory.add(&fadt(dsdt)));
    xsdt.add_entry(memory.add(&madt(vcpus)));
    let xsdt = memory.add(&xsdt);
    memory.finish(xsdt)
}

/// Tables one after another, as they will lie from [`RSDP`] on, with room for the RSDP itself in front.
struct Tables(Vec<u8>);

impl Default for Tables {
    fn default() -> Self {
        Self(vec![0; Rsdp::len()])
    }
}

impl Tables {
    /// Appends a table and returns its guest physical address, aligned to 8 bytes.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        let address = RSDP + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        address
    }

    fn finish(self, xsdt: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
        bytes.extend(&self.0[Rsdp::len()..]);
        bytes
    }
}

/// Fixed description table. The i8042's bit stays clear, so that Linux doesn't probe for a keyboard: the controller is
/// there for its reset line only, and a reset through ACPI comes before that.
fn fadt(dsdt: u64) -> FADT {
    let port = u64::from(layout::ACPI_PM);
    let register = |offset| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port + offset);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_NO_VGA.into();
    fadt.century = devices::RTC_CENTURY;
    fadt.sleep_control_reg = register(0);
    fadt.sleep_status_reg = register(1);
    fadt.reset_reg = register(u64::from(layout::ACPI_PM_RESET));
    fadt.reset_value = devices::RESET_VALUE;
    fadt.finalize()
}

/// Multiple APIC description table. Flags are zero: no `PCAT_COMPAT`, since the guest need not mask any PIC.
fn madt(vcpus: u32) -> Sdt {
    debug_assert!(layout::VCPUS.contains(&vcpus));
    let mut madt = Sdt::new(*b"APIC", MADT_LEN, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(HEADER_LEN as usize, layout::LOCAL_APIC as u32);
    for id in 0..vcpus as u8 {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(IOAPIC_ID, layout::IOAPIC as u32, 0)));
    madt.append_slice(&LINT1_NMI);
    madt
}

/// Local APIC NMI structure (ACPI 6.5, 5.2.12.7): of all processors, with the bus's polarity and trigger mode, LINT1.
const LINT1_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];

/// The devices and the soft-off state.
fn dsdt(virtio: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let fixed = [soft_off(), com1(), rtc(), panic_device(), generation_id(), generic_events()];
    for object in fixed.into_iter().chain((0..virtio).map(virtio_device)) {
        dsdt.append_slice(&object);
    }
    dsdt
}

/// `\_S5`: the value for the sleep control register; the others are of no use with one register.
fn soft_off() -> Vec<u8> {
    let package = aml::Package::new(vec![&devices::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    bytes(&aml::Name::new(Path::new("\\_S5_"), &package))
}

/// A 16550A-compatible port, with an interrupt of its own: edge, active high.
fn com1() -> Vec<u8> {
    let ports = io(layout::COM1, layout::COM1_LEN);
    let line = aml::Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&ports, &line]);
    device("\\_SB_.COM1", &aml::EISAName::new("PNP0501"), &resources)
}

/// The real-time clock, without an interrupt.
fn rtc() -> Vec<u8> {
    let ports = io(layout::RTC, layout::RTC_LEN);
    device("\\_SB_.RTC_", &aml::EISAName::new("PNP0B00"), &aml::ResourceTemplate::new(vec![&ports]))
}

/// Where the generation id lies: low and high half of its address. Linux knows the device by the `_HID` (since 5.18), the
/// specification ("Virtual Machine Generation ID") by the `_CID`.
fn generation_id() -> Vec<u8> {
    let hid = aml::Name::new(Path::new("_HID"), &"VMGENCTR");
    let cid = aml::Name::new(Path::new("_CID"), &"VM_Gen_Counter");
    let ddn = aml::Name::new(Path::new("_DDN"), &"VM_Gen_Counter");
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    let halves = aml::Package::new(vec![&low, &high]);
    let addr = aml::Name::new(Path::new("ADDR"), &halves);
    bytes(&aml::Device::new(Path::new(GENERATION_DEVICE), vec![&hid, &cid, &ddn, &addr]))
}

const GENERATION_DEVICE: &str = "\\_SB_.VGEN";

/// The generic event device (ACPI 6.5, 5.6.9), which stands in for the SCI that hardware-reduced ACPI lacks. Its one event is
/// that the generation id has changed.
fn generic_events() -> Vec<u8> {
    let hid = aml::Name::new(Path::new("_HID"), &"ACPI0013");
    let uid = aml::Name::new(Path::new("_UID"), &aml::ZERO);
    let line = aml::Interrupt::new(true, true, false, false, layout::GED_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&line]);
    let crs = aml::Name::new(Path::new("_CRS"), &resources);
    let (target, value) = (Path::new(GENERATION_DEVICE), GENERATION_CHANGED);
    let notify = aml::Notify::new(&target, &value);
    let ours = aml::Equal::new(&aml::Arg(0), &layout::GED_IRQ);
    let branch = aml::If::new(&ours, vec![&notify]);
    let event = aml::Method::new(Path::new("_EVT"), 1, true, vec![&branch]);
    bytes(&aml::Device::new(Path::new("\\_SB_.GED_"), vec![&hid, &uid, &crs, &event]))
}

/// pvpanic (QEMU, `docs/specs/pvpanic`).
fn panic_device() -> Vec<u8> {
    let ports = io(layout::PANIC_PORT, 1);
    device("\\_SB_.PEVT", &"QEMU0001", &aml::ResourceTemplate::new(vec![&ports]))
}

/// A virtio-mmio window, by the id that Linux's `virtio_mmio` driver knows. DMA is coherent, as all of x86's is.
fn virtio_device(slot: usize) -> Vec<u8> {
    let window =
        aml::Memory32Fixed::new(true, layout::virtio_window(slot) as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let line = aml::Interrupt::new(true, true, false, false, layout::virtio_gsi(slot));
    let hid = aml::Name::new(Path::new("_HID"), &"LNRO0005");
    let uid = aml::Name::new(Path::new("_UID"), &(slot as u8));
    let coherent = aml::Name::new(Path::new("_CCA"), &aml::ONE);
    let crs = aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&window, &line]));
    bytes(&aml::Device::new(Path::new(&format!("\\_SB_.VR{slot:02}")), vec![&hid, &uid, &coherent, &crs]))
}

fn device(path: &str, id: &dyn Aml, resources: &dyn Aml) -> Vec<u8> {
    let hid = aml::Name::new(Path::new("_HID"), id);
    let uid = aml::Name::new(Path::new("_UID"), &aml::ZERO);
    let crs = aml::Name::new(Path::new("_CRS"), resources);
    bytes(&aml::Device::new(Path::new(path), vec![&hid, &uid, &crs]))
}

fn io(first: u16, len: u16) -> aml::IO {
    aml::IO::new(first, first, 1, len as u8)
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
