//! A copy of `/proc/vmcore`: Linux lays the file out anew, and it restores all the same.

use crate::{
    damage::Victim,
    forge::{elf_header, note, program_header},
    machine::{Machine, chain, original, restored, verify},
};
use snapshot_format::Image;
use std::ops::Range;

/// What differs between kernels, and between what they are given.
#[derive(Clone, Copy)]
struct Kernel {
    /// `p_align` of PT_NOTE: 0, and 4 in newer versions.
    note_align: u64,
    /// `p_align` of PT_LOAD, as given to it.
    load_align: u64,
    /// Added to physical addresses for `p_vaddr`.
    map: u64,
    /// The order of the PT_LOADs, as given to it.
    backwards: bool,
    /// Notes of other owners, before and after ours.
    foreign: bool,
}

const PLAIN: Kernel = Kernel { note_align: 0, load_align: 0, map: 0, backwards: false, foreign: false };

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Offset, address and length of a segment.
fn segment(bytes: &[u8], index: usize) -> (u64, u64, u64) {
    let at = 64 + 56 * index;
    (number(bytes, at + 8), number(bytes, at + 24), number(bytes, at + 32))
}

fn foreign_notes() -> Vec<u8> {
    note(b"VMCOREINFO\0", 0, b"OSRELEASE=6.1.0-41-cloud-amd64\nPAGESIZE=4096\n\0")
}

/// Does what `fs/proc/vmcore.c` does with a machine's `elfcorehdr`: one PT_NOTE with all notes, at the page after the
/// headers; RAM from the page after that; `p_paddr` kept.
fn relay(bytes: &[u8], kernel: Kernel) -> Vec<u8> {
    let count = usize::from(bytes[56]);
    let (offset, _, len) = segment(bytes, 0);
    let mut notes = bytes[offset as usize..(offset + len) as usize].to_vec();
    if kernel.foreign {
        notes = [foreign_notes(), notes, note(b"LINUX\0", 0x700, b"device dump")].concat();
    }
    let mut loads: Vec<_> = (1..count).map(|index| segment(bytes, index)).collect();
    if kernel.backwards {
        loads.reverse();
    }
    let ram_start = 4096 + notes.len().next_multiple_of(4096);
    let mut out = elf_header(count);
    let len = notes.len() as u64;
    out.extend(program_header(4, 0, [4096, 0, 0, len, len, kernel.note_align]));
    let mut offset = ram_start as u64;
    for (_, gpa, len) in &loads {
        let vaddr = gpa.wrapping_add(kernel.map);
        out.extend(program_header(1, 7, [offset, vaddr, *gpa, *len, *len, kernel.load_align]));
        offset += len;
    }
    out.resize(4096, 0);
    out.extend(notes);
    out.resize(ram_start, 0);
    for (offset, _, len) in &loads {
        out.extend(&bytes[*offset as usize..(offset + len) as usize]);
    }
    out
}

#[test]
fn the_machine_comes_back_from_every_layout() {
    let machine = Machine::small();
    let bytes = machine.file();
    let direct_map = 0xffff_8880_0000_0000;
    let kernels = [
        PLAIN,
        Kernel { note_align: 4, load_align: 4096, ..PLAIN },
        Kernel { map: direct_map, ..PLAIN },
        Kernel { foreign: true, ..PLAIN },
        Kernel { backwards: true, foreign: true, map: direct_map, ..PLAIN },
    ];
    for kernel in kernels {
        let copy = relay(&bytes, kernel);
        assert_ne!(copy[..4096], bytes[..4096]);
        assert_eq!(Image::check(&copy).unwrap().layout.ram(), verify(&copy).unwrap().ram());
        let snapshot = verify(&copy).unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(restored(&snapshot), original(&machine));
        assert_eq!(snapshot.manifest(), verify(&bytes).unwrap().manifest());
        assert!(snapshot.sections().eq(machine.sections.iter().map(|section| section.as_ref())));
    }
}

/// What a kernel reads at these addresses: the headers and notes, and RAM behind them.
fn memory(hdr: &[u8], at: u64, window: u64, ram: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut out = hdr.to_vec();
    let mut offsets = vec![number(hdr, 64 + 8) - at];
    for (index, (gpa, bytes)) in (1..).zip(ram) {
        assert_eq!(segment(hdr, index), (window + gpa, *gpa, bytes.len() as u64));
        offsets.push(out.len() as u64);
        out.extend(bytes);
    }
    for (index, offset) in offsets.iter().enumerate() {
        let field = 64 + 56 * index + 8;
        out[field..field + 8].copy_from_slice(&offset.to_le_bytes());
    }
    out
}

#[test]
fn what_linux_makes_of_an_elfcorehdr_is_the_machine() {
    let machine = Machine::small();
    let (at, window) = (7 << 30, 8 << 30);
    let Machine { about, vcpus, vmcoreinfo, sections, ram } = &machine;
    let vmcoreinfo = *vmcoreinfo;
    let contents = snapshot::Contents { about: about.clone(), vcpus, vmcoreinfo, sections, ram, delta: None };
    let hdr = snapshot::Elfcorehdr::new(&contents, at, window).unwrap();
    // Linux reads as many bytes of notes as p_memsz says, and stops at a note header of zeroes.
    let notes = segment(&hdr.bytes, 0);
    let read = number(&hdr.bytes, 64 + 40);
    assert!(notes.0 == at + 4096 && read >= notes.2 + 12 && hdr.bytes.len() as u64 == 4096 + read);
    assert!(hdr.bytes[(4096 + notes.2) as usize..].iter().all(|byte| *byte == 0));
    let copy = relay(&memory(&hdr.bytes, at, window, &original(&machine)), PLAIN);
    assert_eq!(copy.len() as u64, hdr.vmcore_len);
    let snapshot = verify(&copy).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(restored(&snapshot), original(&machine));
    assert_eq!(snapshot.manifest(), verify(&machine.file()).unwrap().manifest());
    snapshot.verify_ram(&mut |_, _| ()).unwrap();
}

#[test]
fn its_ram_is_checked_in_the_order_of_addresses() {
    let machine = Machine::small();
    let mut copy = relay(&machine.file(), Kernel { backwards: true, ..PLAIN });
    let victim = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(victim.path(), &copy).unwrap();
    let open = || snapshot::UnverifiedSnapshot::open(victim.path()).unwrap().verify().unwrap();
    open().verify_ram(&mut |_, _| ()).unwrap();
    *copy.last_mut().unwrap() ^= 1;
    std::fs::write(victim.path(), &copy).unwrap();
    let error = open().verify_ram(&mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("GPA 0x200000 "), "{error}");
}

#[test]
fn any_flipped_bit_is_found_but_in_what_linux_chooses_itself() {
    let kernel = Kernel { foreign: true, note_align: 4, load_align: 4096, ..PLAIN };
    let bytes = relay(&Machine::tiny().file(), kernel);
    let ram_start = segment(&bytes, 1).0 as usize;
    let (notes, _, len) = segment(&bytes, 0);
    let first = notes as usize..notes as usize + foreign_notes().len();
    let last_len = note(b"LINUX\0", 0x700, b"device dump").len();
    let end = (notes + len) as usize;
    let aligns = (0..3).map(|index| 64 + 56 * index + 48).map(|at| at..at + 8);
    let free: Vec<Range<usize>> = [first, end - last_len..end].into_iter().chain(aligns).collect();
    let victim = Victim::new(&bytes);
    for (offset, byte) in bytes[..ram_start].iter().enumerate() {
        for bit in 0..8 {
            victim.put(offset, byte ^ (1 << bit));
            let found = victim.complaint().is_some();
            assert!(found || free.iter().any(|range| range.contains(&offset)), "bit {bit} of byte {offset}");
        }
        victim.put(offset, *byte);
    }
}

#[test]
fn other_layouts_are_refused() {
    let bytes = Machine::tiny().file();
    let random_map = Kernel { map: 0x1234_5000, ..PLAIN };
    assert!(chain(&verify(&relay(&bytes, random_map)).unwrap_err()).contains("p_vaddr"));
    let mut moved = relay(&bytes, PLAIN);
    moved[64 + 9] = 0x20;
    assert!(chain(&verify(&moved).unwrap_err()).contains("p_offset"));
    let mut cut = relay(&bytes, PLAIN);
    cut.pop();
    assert!(chain(&verify(&cut).unwrap_err()).contains("truncated"));
}
