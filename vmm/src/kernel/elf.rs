//! The ELF vmlinux, and our own bare-metal guests, which have the same shape.
//!
//! In: an ELF64 executable for x86-64. Out: its `PT_LOAD`s at their physical addresses. Holds: each segment lies in the
//! file and in RAM from 1 MiB on, and the entry point is inside one.

use super::file::Image;
use super::{KERNEL, KernelError, KernelIdentity, LoadedKernel, Protocol, ProtocolChoice, printable};
use crate::layout;
use devices::Memory;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use memchr::memmem;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_CORE: u16 = 4;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PHDR_SIZE: u16 = size_of::<Elf64_Phdr>() as u16;
/// Linux has five, our guests fewer.
const PHDRS_MAX: u16 = 64;
/// Linux has less than 1 KiB of notes.
const NOTES_MAX: u64 = 1 << 20;
/// Xen `public/elfnote.h`: the descriptor is the physical address of the 32-bit entry point.
const XEN_PHYS32_ENTRY: u32 = 18;
const GNU_BUILD_ID: u32 = 3;
const BUILD_ID_MAX: usize = 64;
const BANNER: &[u8] = b"Linux version ";
const BANNER_MAX: u64 = 512;
const WINDOW: u64 = 1 << 20;

/// One ELF note.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    desc: &'a [u8],
}

/// What the notes say.
#[derive(Default)]
struct Notes {
    pvh_entry: Option<u64>,
    build_id: Option<Vec<u8>>,
}

/// Loads all segments and picks the entry point that `choice` asks for.
pub(super) fn load(
    image: &Image<'_>,
    mem: &Memory,
    choice: ProtocolChoice,
    ram: u64,
) -> Result<LoadedKernel, KernelError> {
    let header: Elf64_Ehdr = image.read(0)?;
    check_header(image, &header)?;
    let phdrs = program_headers(image, &header)?;
    let notes = notes(image, &phdrs)?;
    let segments: Vec<_> = phdrs.iter().filter(|phdr| phdr.p_type == PT_LOAD && phdr.p_memsz > 0).collect();
    let (protocol, entry) = entry(image, choice, header.e_entry, notes.pvh_entry)?;
    if !segments.iter().any(|s| (s.p_paddr..s.p_paddr.saturating_add(s.p_filesz)).contains(&entry)) {
        return Err(image.unusable(format!("its entry point {entry:#x} is in no loaded segment")));
    }
    let mut end = layout::HIGH_RAM_START;
    for segment in &segments {
        end = end.max(load_segment(image, segment, mem, ram)?);
    }
    let identity = KernelIdentity { version: version(image, &segments)?, build_id: notes.build_id };
    Ok(LoadedKernel { entry, protocol, end, header: None, identity })
}

fn check_header(image: &Image<'_>, header: &Elf64_Ehdr) -> Result<(), KernelError> {
    let found = if header.e_ident[4] != CLASS_64 {
        "a 32-bit ELF file".into()
    } else if header.e_ident[5] != LITTLE_ENDIAN {
        "a big-endian ELF file".into()
    } else if header.e_machine != MACHINE_X86_64 {
        format!("an ELF file for machine {}{}", header.e_machine, machine_name(header.e_machine))
    } else if header.e_type == TYPE_CORE {
        "an ELF core file (a snapshot?)".into()
    } else if header.e_type != TYPE_EXEC {
        format!("an ELF file of type {} (a module, a library or a program?)", header.e_type)
    } else {
        return Ok(());
    };
    Err(image.wrong(found, KERNEL))
}

fn machine_name(machine: u16) -> &'static str {
    match machine {
        3 => " (i386)",
        40 => " (Arm)",
        183 => " (AArch64)",
        243 => " (RISC-V)",
        _ => "",
    }
}

fn program_headers(image: &Image<'_>, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let (count, size) = (header.e_phnum, header.e_phentsize);
    if size != PHDR_SIZE || count == 0 || count > PHDRS_MAX {
        let expected = format!("expected 1 to {PHDRS_MAX} of {PHDR_SIZE} bytes");
        return Err(image.unusable(format!("it has {count} program headers of {size} bytes; {expected}")));
    }
    (0..u64::from(count))
        .map(|index| image.read(header.e_phoff.saturating_add(index * u64::from(PHDR_SIZE))))
        .collect()
}

/// Copies a segment and returns where it ends in RAM.
fn load_segment(image: &Image<'_>, segment: &Elf64_Phdr, mem: &Memory, ram: u64) -> Result<u64, KernelError> {
    let (start, file, memory) = (segment.p_paddr, segment.p_filesz, segment.p_memsz);
    if start < layout::HIGH_RAM_START {
        return Err(image.unusable(format!("it has a segment at {start:#x}; expected 1 MiB or above")));
    }
    if file > memory {
        return Err(image.unusable(format!("it has a segment of {file} bytes for {memory} bytes of memory")));
    }
    let end = start.saturating_add(memory);
    image.check_end(end, ram)?;
    image.copy(segment.p_offset, file, mem, start)?;
    Ok(end)
}

fn entry(
    image: &Image<'_>,
    choice: ProtocolChoice,
    linux64: u64,
    pvh: Option<u64>,
) -> Result<(Protocol, u64), KernelError> {
    match (choice, pvh) {
        (ProtocolChoice::Linux64, _) | (ProtocolChoice::Auto, None) => Ok((Protocol::Linux64, linux64)),
        (_, Some(entry)) => Ok((Protocol::Pvh, entry)),
        (ProtocolChoice::Pvh, None) => Err(image.unusable("it has no PVH entry (Xen note 18)".into())),
    }
}

fn notes(image: &Image<'_>, phdrs: &[Elf64_Phdr]) -> Result<Notes, KernelError> {
    let mut found = Notes::default();
    for phdr in phdrs.iter().filter(|phdr| phdr.p_type == PT_NOTE) {
        let size = phdr.p_filesz;
        if size > NOTES_MAX {
            return Err(image.unusable(format!("it has {size} bytes of notes; expected at most {NOTES_MAX}")));
        }
        let align = if phdr.p_align == 8 { 8 } else { 4 };
        read_notes(&image.bytes(phdr.p_offset, size)?, align, &mut found);
    }
    Ok(found)
}

/// Goes through a note segment up to its end or its first malformed note.
fn read_notes(mut bytes: &[u8], align: usize, found: &mut Notes) {
    while let Some((note, rest)) = split_note(bytes, align) {
        match (note.name, note.kind) {
            (b"Xen\0", XEN_PHYS32_ENTRY) => found.pvh_entry = address(note.desc),
            (b"GNU\0", GNU_BUILD_ID) if note.desc.len() <= BUILD_ID_MAX => {
                found.build_id = Some(note.desc.to_vec());
            }
            _ => {}
        }
        bytes = rest;
    }
}

/// The first note, and what comes after it.
fn split_note(bytes: &[u8], align: usize) -> Option<(Note<'_>, &[u8])> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (name_len, desc_len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
    let desc_start = (12 + name_len).next_multiple_of(align);
    let next = (desc_start + desc_len).next_multiple_of(align);
    let name = bytes.get(12..12 + name_len)?;
    let desc = bytes.get(desc_start..desc_start + desc_len)?;
    Some((Note { name, kind, desc }, bytes.get(next..).unwrap_or_default()))
}

/// A PVH entry of 4 bytes, or of 8 as some kernels have it.
fn address(desc: &[u8]) -> Option<u64> {
    let mut bytes = [0; 8];
    bytes.get_mut(..desc.len())?.copy_from_slice(desc);
    (desc.len() >= 4).then(|| u64::from_le_bytes(bytes)).filter(|entry| u32::try_from(*entry).is_ok())
}

/// The text after `Linux version ` in the kernel's banner.
fn version(image: &Image<'_>, segments: &[&Elf64_Phdr]) -> Result<Option<String>, KernelError> {
    for segment in segments {
        let mut offset = 0;
        while offset < segment.p_filesz {
            // Windows overlap by the longest banner, and one that begins in the overlap is the next window's.
            let len = (WINDOW + BANNER_MAX).min(segment.p_filesz - offset);
            if let Some(version) = find_version(&image.bytes(segment.p_offset + offset, len)?) {
                return Ok(Some(version));
            }
            offset += WINDOW;
        }
    }
    Ok(None)
}

/// The kernel has the text several times: as a format, without a build number, and as `/proc/version` shows it.
fn find_version(window: &[u8]) -> Option<String> {
    let starts = memmem::find_iter(window, BANNER).take_while(|start| *start < WINDOW as usize);
    let texts = starts.map(|start| &window[start..window.len().min(start + BANNER_MAX as usize)]);
    texts.filter_map(|text| printable(&text[BANNER.len()..])).find(|text| has_build_number(text))
}

fn has_build_number(text: &str) -> bool {
    text.split_once(" #").is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()))
}
