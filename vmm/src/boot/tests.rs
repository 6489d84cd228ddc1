//! What a guest finds in RAM.

use super::*;
use crate::kernel::synthetic::{MIB, bzimage, elf, file, notes, ram};
use linux_loader::bootparam::boot_params;
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use tempfile::NamedTempFile;
use vm_memory::ByteValued;

const MEMORY: u64 = 64 * MIB;

struct Files {
    kernel: NamedTempFile,
    initrd: NamedTempFile,
}

fn files(kernel: &[u8]) -> Files {
    Files { kernel: file(kernel), initrd: file(&[7; 100]) }
}

fn source(files: &Files, cmdline: &str) -> BootSource {
    let (kernel, initrd) = (files.kernel.path().into(), Some(files.initrd.path().into()));
    BootSource {
        kernel,
        initrd,
        cmdline: cmdline.into(),
        protocol: ProtocolChoice::Auto,
        reserved: Vec::new(),
    }
}

fn read<T: ByteValued>(mem: &Memory, address: u64) -> T {
    mem.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn pvh_start_info_points_to_everything() {
    let (mem, files) = (ram(MEMORY), files(&elf(&notes())));
    let boot = load(&mem, &source(&files, "console=ttyS0"), MEMORY, b"RSD PTR ").unwrap();
    assert_eq!(boot.entry.protocol, Protocol::Pvh);
    let info: hvm_start_info = read(&mem, layout::PVH_START_INFO);
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (layout::ACPI_TABLES, layout::CMDLINE));
    assert_eq!(read::<[u8; 14]>(&mem, info.cmdline_paddr), *b"console=ttyS0\0");
    assert_eq!(read::<[u8; 8]>(&mem, info.rsdp_paddr), *b"RSD PTR ");
    let module: hvm_modlist_entry = read(&mem, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (MEMORY - 0x1000, 100));
    let last = info.memmap_paddr + 24 * u64::from(info.memmap_entries - 1);
    let last: hvm_memmap_table_entry = read(&mem, last);
    assert_eq!((last.addr, last.size, last.type_), (MIB, MEMORY - MIB, 1));
}

#[test]
fn zero_page_keeps_the_kernels_header_and_adds_the_loaders() {
    let (mem, files) = (ram(MEMORY), files(&bzimage()));
    let boot = load(&mem, &source(&files, "quiet"), MEMORY, b"RSD PTR ").unwrap();
    assert_eq!(boot.entry.protocol, Protocol::Linux64);
    let params: boot_params = read(&mem, layout::ZERO_PAGE);
    let header = params.hdr;
    assert_eq!(({ header.version }, header.type_of_loader, { header.init_size }), (0x20f, 0xff, 4 << 20));
    assert_eq!({ header.cmd_line_ptr }, layout::CMDLINE as u32);
    assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (MEMORY as u32 - 0x1000, 100));
    assert_eq!(({ params.acpi_rsdp_addr }, params.e820_entries), (layout::ACPI_TABLES, 3));
    assert_eq!({ params.e820_table[1].addr }, layout::ACPI_TABLES);
}

#[test]
fn an_elf_kernel_gets_a_header_of_its_own() {
    let (mem, files) = (ram(MEMORY), files(&elf(&[])));
    load(&mem, &BootSource { initrd: None, ..source(&files, "") }, MEMORY, &[]).unwrap();
    let params: boot_params = read(&mem, layout::ZERO_PAGE);
    assert_eq!(({ params.hdr.header }, params.hdr.loadflags), (u32::from_le_bytes(*b"HdrS"), 1));
    assert_eq!(({ params.hdr.ramdisk_size }, { params.acpi_rsdp_addr }), (0, 0));
}

#[test]
fn memory_map_has_the_hole_below_4_gib() {
    let ends = |memory| {
        memory_map(memory, &[]).iter().map(|r| (r.start, r.start + r.size, r.kind)).collect::<Vec<_>>()
    };
    use RangeKind::{Ram, Reserved};
    let low = [(0, 0x9_fc00, Ram), (0xe_0000, 0x10_0000, Reserved)];
    assert_eq!(ends(64 * MIB), [&low[..], &[(MIB, 64 * MIB, Ram)]].concat());
    assert_eq!(ends(3 << 30), [&low[..], &[(MIB, 3 << 30, Ram)]].concat());
    assert_eq!(ends(6 << 30), [&low[..], &[(MIB, 3 << 30, Ram), (4 << 30, 7 << 30, Ram)]].concat());
}

#[test]
fn command_lines_that_do_not_fit_are_refused() {
    let (mem, files) = (ram(MEMORY), files(&bzimage()));
    let refusal =
        |cmdline: &str| load(&mem, &source(&files, cmdline), MEMORY, &[]).map(drop).unwrap_err().to_string();
    assert!(load(&mem, &source(&files, &"x".repeat(2047)), MEMORY, &[]).is_ok());
    assert_eq!(refusal(&"x".repeat(2048)), "the command line has 2048 bytes; at most 2047 are possible");
    assert_eq!(refusal("a\nb"), "the command line has '\\n' at byte 1; expected printable ASCII");
    assert_eq!(refusal("é"), "the command line has 'é' at byte 0; expected printable ASCII");
    assert_eq!(refusal("a\0b"), "the command line has '\\0' at byte 1; expected printable ASCII");
}

#[test]
fn acpi_tables_that_do_not_fit_are_refused() {
    let (mem, files) = (ram(MEMORY), files(&bzimage()));
    let refusal = load(&mem, &source(&files, ""), MEMORY, &vec![1; 0x1_f001]).unwrap_err().to_string();
    assert_eq!(refusal, "the ACPI tables have 126977 bytes; at most 126976 fit");
    assert!(load(&mem, &source(&files, ""), MEMORY, &vec![1; 0x1_f000]).is_ok());
}

#[test]
fn the_reset_vector_writes_the_reset_register() {
    let (mem, files) = (ram(MEMORY), files(&bzimage()));
    load(&mem, &source(&files, ""), MEMORY, &[]).unwrap();
    let mut code = [0; 9];
    mem.read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
    assert_eq!(code, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
}

#[test]
fn very_little_memory_is_an_error_and_no_panic() {
    let files = files(&elf(&notes()));
    for memory in [0x1000, 0x8000, 0xa_0000, MIB] {
        let error = load(&ram(memory), &source(&files, ""), memory, &[]).unwrap_err().to_string();
        assert!(error.contains("needs RAM up to"), "{error}");
    }
}
