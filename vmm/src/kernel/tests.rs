//! Good kernels load; every bad file gets its own line.

use super::synthetic::{
    BZIMAGE_INIT_SIZE, BZIMAGE_START, ELF_START, MIB, PVH_OFFSET, bzimage, elf, elf_with_banner_at, file,
    note, notes, patched, ram,
};
use super::*;
use vm_memory::{Bytes, GuestAddress};

fn try_load(image: &[u8], choice: ProtocolChoice, size: u64) -> Result<LoadedKernel, KernelError> {
    load(&ram(size), file(image).path(), choice, size)
}

/// The one line that loading `image` ends with, after the file's name.
fn refusal(image: &[u8], choice: ProtocolChoice) -> String {
    let file = file(image);
    let error = load(&ram(64 * MIB), file.path(), choice, 64 * MIB).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error.strip_prefix(&file.path().display().to_string()).expect(&error).trim_start().into()
}

fn assert_refused(image: &[u8], expected: &str) {
    let error = refusal(image, ProtocolChoice::Auto);
    assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
}

#[test]
fn elf_with_a_note_starts_at_its_pvh_entry() {
    let (mem, file) = (ram(64 * MIB), file(&elf(&notes())));
    let kernel = load(&mem, file.path(), ProtocolChoice::Auto, 64 * MIB).unwrap();
    assert_eq!((kernel.protocol, kernel.entry), (Protocol::Pvh, ELF_START + PVH_OFFSET));
    assert!((ELF_START + MIB..ELF_START + MIB + 0x1000).contains(&kernel.end));
    assert_eq!(kernel.identity.version.as_deref(), Some("6.1.0-test (me) #1 SMP"));
    assert_eq!(kernel.identity.build_id, Some(vec![0xab; 20]));
    assert_eq!(mem.read_obj::<u32>(GuestAddress(ELF_START)).unwrap(), 0x9090_9090);
}

#[test]
fn elf_starts_at_its_64_bit_entry_when_asked_or_when_there_is_no_note() {
    for (notes, choice) in [(notes(), ProtocolChoice::Linux64), (vec![], ProtocolChoice::Auto)] {
        let kernel = try_load(&elf(&notes), choice, 64 * MIB).unwrap();
        assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, ELF_START));
    }
    assert!(refusal(&elf(&[]), ProtocolChoice::Pvh).contains("no PVH entry"));
}

/// The banner was cut where a window ended.
#[test]
fn the_version_is_whole_wherever_the_banner_is() {
    for offset in ((MIB as usize - 80)..(MIB as usize + 600)).step_by(7) {
        let mem = ram(64 * MIB);
        let file = file(&elf_with_banner_at(offset, &notes()));
        let kernel = load(&mem, file.path(), ProtocolChoice::Auto, 64 * MIB).unwrap();
        assert_eq!(kernel.identity.version.as_deref(), Some("6.1.0-test (me) #1 SMP"), "at {offset}");
    }
}

#[test]
fn pvh_note_is_found_after_others_and_may_have_four_bytes() {
    let entry = (ELF_START as u32 + 8).to_le_bytes();
    let notes =
        [note(b"Xen\0", 6, b"linux\0"), note(b"Linux\0", 18, &[1; 4]), note(b"Xen\0", 18, &entry)].concat();
    assert_eq!(try_load(&elf(&notes), ProtocolChoice::Auto, 64 * MIB).unwrap().entry, ELF_START + 8);
}

#[test]
fn bzimage_starts_at_its_64_bit_entry_and_keeps_its_header() {
    let (mem, file) = (ram(64 * MIB), file(&bzimage()));
    let kernel = load(&mem, file.path(), ProtocolChoice::Auto, 64 * MIB).unwrap();
    assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, BZIMAGE_START + 0x200));
    assert_eq!(kernel.end, BZIMAGE_START + BZIMAGE_INIT_SIZE);
    assert_eq!({ kernel.header.unwrap().init_size }, BZIMAGE_INIT_SIZE as u32);
    assert_eq!(kernel.identity.version.as_deref(), Some("6.12.0-test (me) #1"));
    assert_eq!(mem.read_obj::<u32>(GuestAddress(kernel.entry)).unwrap(), 0x9090_9090);
}

#[test]
fn files_of_other_kinds_are_named() {
    assert_refused(b"", "is empty; expected a Linux kernel");
    assert_refused(b"#!/bin/sh\necho no\n", "is a text file; expected");
    assert_refused(&[0x1f, 0x8b, 8, 0, 0], "is gzip-compressed data; expected");
    assert_refused(&[0xff; 4096], "is data that begins with [ff, ff");
    assert_refused(&patched(vec![0; 4096], 0x38, b"ARM\x64"), "is an arm64 Image; expected");
    assert_refused(&patched(elf(&notes()), 4, &[1]), "is a 32-bit ELF file; expected");
    assert_refused(&patched(elf(&notes()), 5, &[2]), "is a big-endian ELF file; expected");
    assert_refused(&patched(elf(&notes()), 16, &[4]), "is an ELF core file (a snapshot?); expected");
    assert_refused(&patched(elf(&notes()), 16, &[3]), "is an ELF file of type 3");
    assert_refused(&patched(elf(&notes()), 18, &[183]), "is an ELF file for machine 183 (AArch64); expected");
}

#[test]
fn things_that_are_no_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let line = |path: &Path| load(&ram(MIB), path, ProtocolChoice::Auto, MIB).unwrap_err().to_string();
    assert!(line(dir.path()).contains("is a directory; expected a Linux kernel"));
    assert!(line(&fifo).contains("is a FIFO; expected a Linux kernel"));
    assert!(line(Path::new("/dev/zero")).contains("is a character device; expected"));
    assert_eq!(line(Path::new("/nonexistent/vmlinux")), "cannot open /nonexistent/vmlinux");
}

#[test]
fn damaged_elf_files_are_refused() {
    let whole = elf(&notes());
    let phdr = 64;
    assert_refused(&whole[..40], "points to 64 bytes at offset 0, and has 40 bytes");
    assert_refused(&whole[..0x1080], "bytes at offset 4096, and has 4224 bytes");
    assert!(
        refusal(&patched(whole.clone(), 24, &[0; 8]), ProtocolChoice::Linux64)
            .contains("in no loaded segment")
    );
    assert_refused(
        &patched(whole.clone(), 32, &[0xff; 8]),
        "points to 56 bytes at offset 18446744073709551615",
    );
    assert_refused(&patched(whole.clone(), 54, &[1, 0]), "program headers of 1 bytes");
    assert_refused(&patched(whole.clone(), 56, &[0xff; 2]), "65535 program headers");
    assert_refused(&patched(whole.clone(), phdr + 8, &[0xff; 8]), "at offset 18446744073709551615");
    assert_refused(&patched(whole.clone(), phdr + 32, &[0xff; 8]), "of 18446744073709551615 bytes for");
    assert_refused(&patched(whole.clone(), phdr + 40, &[0xff; 8]), "needs RAM up to");
    assert_refused(&patched(whole.clone(), phdr + 56 + 32, &[0xff; 8]), "bytes of notes; expected at most");
    let low = patched(whole, phdr + 24, &0xf_f000u64.to_le_bytes());
    let low = patched(low, 0x200 + 16, &0xf_f040u64.to_le_bytes());
    assert_refused(&low, "segment at 0xff000; expected 1 MiB or above");
}

#[test]
fn damaged_bzimages_are_refused() {
    let whole = bzimage();
    assert_refused(&whole[..0x500], "is truncated: 1280 bytes; its header says 5120");
    assert_refused(&patched(whole.clone(), 0x1f4, &[0xff; 4]), "is truncated");
    assert_refused(&patched(whole.clone(), 0x206, &[0x0b, 0x02]), "protocol is 2.11; expected 2.12");
    assert_refused(&patched(whole.clone(), 0x236, &[0]), "no 64-bit entry");
    assert_refused(&patched(whole.clone(), 0x258, &[0; 8]), "expected 1 MiB or above");
    assert_refused(&patched(whole.clone(), 0x258, &[0xff; 8]), "needs RAM up to");
    assert_refused(
        &patched(whole.clone(), 0x260, &[0xff; 4]),
        "needs RAM up to 4112 MiB, and the machine has 64 MiB",
    );
    assert!(refusal(&whole, ProtocolChoice::Pvh).contains("a bzImage has no PVH entry"));
}

#[test]
fn no_damage_to_a_header_makes_the_loader_panic() {
    let mem = ram(64 * MIB);
    for whole in [elf(&notes()), bzimage()] {
        for at in 0..0x280 {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let image = file(&patched(whole.clone(), at, &[byte]));
                let _ = load(&mem, image.path(), ProtocolChoice::Auto, 64 * MIB);
            }
        }
    }
}

#[test]
fn a_kernel_larger_than_ram_is_refused_with_both_sizes() {
    let error = try_load(&elf(&notes()), ProtocolChoice::Auto, 16 * MIB).unwrap_err().to_string();
    assert!(error.ends_with("needs RAM up to 18 MiB, and the machine has 16 MiB"), "{error}");
}

#[test]
fn initrd_goes_to_the_highest_page_below_the_end_of_ram() {
    let (mem, image) = (ram(64 * MIB), file(&[7; 5000]));
    let kernel = load(&mem, file(&elf(&notes())).path(), ProtocolChoice::Auto, 64 * MIB).unwrap();
    let initrd = load_initrd(&mem, image.path(), &kernel, 64 * MIB).unwrap();
    assert_eq!(initrd, Initrd { address: 64 * MIB - 0x2000, size: 5000 });
    assert_eq!(mem.read_obj::<u8>(GuestAddress(initrd.address + 4999)).unwrap(), 7);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(initrd.address + 5000)).unwrap(), 0);
}

#[test]
fn initrd_stays_below_what_the_bzimage_can_reach() {
    let bzimage = patched(bzimage(), 0x22c, &(32 * MIB as u32 - 1).to_le_bytes());
    let (mem, image) = (ram(64 * MIB), file(&[7; 4096]));
    let kernel = load(&mem, file(&bzimage).path(), ProtocolChoice::Auto, 64 * MIB).unwrap();
    assert_eq!(load_initrd(&mem, image.path(), &kernel, 64 * MIB).unwrap().address, 32 * MIB - 0x1000);
}

#[test]
fn initrd_that_reaches_into_the_kernels_working_space_is_refused() {
    let (mem, image) = (ram(21 * MIB), file(&vec![7; MIB as usize + 1]));
    let kernel = load(&mem, file(&bzimage()).path(), ProtocolChoice::Auto, 21 * MIB).unwrap();
    let error = load_initrd(&mem, image.path(), &kernel, 21 * MIB).unwrap_err().to_string();
    assert!(
        error.ends_with("has 2 MiB, and between the kernel and the end of RAM there are 1 MiB"),
        "{error}"
    );
    let error = load_initrd(&mem, file(&[]).path(), &kernel, 21 * MIB).unwrap_err().to_string();
    assert!(error.ends_with("is empty; expected an initrd"), "{error}");
}
