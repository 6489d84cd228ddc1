//! Kernels made for tests: the smallest files that a loader has to accept, open to damage.

use devices::Memory;
use std::io::Write;
use tempfile::NamedTempFile;
use vm_memory::GuestAddress;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const ELF_START: u64 = 16 * MIB;
pub(crate) const PVH_OFFSET: u64 = 0x40;
pub(crate) const BZIMAGE_START: u64 = 16 * MIB;
pub(crate) const BZIMAGE_INIT_SIZE: u64 = 4 * MIB;

/// Guest RAM of `size` bytes, at most 3 GiB.
pub(crate) fn ram(size: u64) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

/// A file with these bytes.
pub(crate) fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Overwrites bytes from `at` on.
pub(crate) fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// An ELF note with its padding.
pub(crate) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, desc.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for part in [name, desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// The notes of [`elf`]: PVH entry and build-id.
pub(crate) fn notes() -> Vec<u8> {
    let entry = ELF_START + PVH_OFFSET;
    [note(b"Xen\0", 18, &entry.to_le_bytes()), note(b"GNU\0", 3, &[0xab; 20])].concat()
}

/// A vmlinux: header, two program headers, `notes` at 0x200, a segment at 0x1000 with a banner; 1 MiB of bss.
pub(crate) fn elf(notes: &[u8]) -> Vec<u8> {
    elf_with_banner_at(0x100, notes)
}

/// The same with the banner so many bytes into the segment.
pub(crate) fn elf_with_banner_at(offset: usize, notes: &[u8]) -> Vec<u8> {
    let mut code = vec![0x90; offset];
    code.extend(b"Linux version 6.1.0-test (me) # SMP\0Linux version 6.1.0-test (me) #1 SMP\n\0");
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ELF_START, 64, 0] {
        image.extend(u64::to_le_bytes(word));
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let size = code.len() as u64;
    image.extend(program_header(1, 0x1000, ELF_START, size, size + MIB));
    image.extend(program_header(4, 0x200, 0, notes.len() as u64, notes.len() as u64));
    image.resize(0x200, 0);
    image.extend(notes);
    image.resize(0x1000, 0);
    image.extend(code);
    image
}

fn program_header(kind: u32, offset: u64, address: u64, file: u64, memory: u64) -> Vec<u8> {
    let head = u64::from(kind) | 7 << 32;
    [head, offset, address, address, file, memory, 4].map(u64::to_le_bytes).concat()
}

/// A bzImage of protocol 2.15 with one setup sector and 4 KiB of code, which needs 4 MiB from 16 MiB on.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + 0x1000];
    image[0x400..].fill(0x90);
    let fields: [(usize, &[u8]); 14] = [
        (0x1f1, &[1]),
        (0x1f4, &0x100u32.to_le_bytes()),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x66]),
        (0x202, b"HdrS"),
        (0x206, &0x020fu16.to_le_bytes()),
        (0x20e, &0x100u16.to_le_bytes()),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffffu32.to_le_bytes()),
        (0x230, &0x20_0000u32.to_le_bytes()),
        (0x236, &1u16.to_le_bytes()),
        (0x238, &2047u32.to_le_bytes()),
        (0x258, &BZIMAGE_START.to_le_bytes()),
        (0x260, &(BZIMAGE_INIT_SIZE as u32).to_le_bytes()),
        (0x300, b"6.12.0-test (me) #1\0"),
    ];
    fields.iter().fold(image, |image, (at, bytes)| patched(image, *at, bytes))
}
