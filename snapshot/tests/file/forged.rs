//! Files that somebody made on purpose: every CRC is right, and what it protects is not.

use crate::{
    forge::{Forge, note},
    machine::{Machine, chain, verify, verify_link},
};
use snapshot::{GenerationId, Manifest, RamRange, SectionEntry, UnverifiedSnapshot};
use std::fs;

/// The manifest of a small machine without sections.
pub(crate) fn manifest() -> Manifest {
    let mut manifest = verify(&Machine::tiny().file()).unwrap().manifest().clone();
    manifest.sections.clear();
    manifest
}

fn complaint(forge: &Forge) -> String {
    match verify(&forge.file()) {
        Ok(_) => "taken".to_owned(),
        Err(error) => chain(&error),
    }
}

#[test]
fn an_honest_forgery_is_a_snapshot() {
    let mut honest = manifest();
    let crc = crc32fast::hash(&[0; 10]);
    honest.sections = vec![SectionEntry { name: "ten".to_owned(), version: 1, len: 10, crc }];
    let snapshot = verify(&Forge::new(&honest).file()).unwrap();
    assert_eq!(snapshot.section("ten").unwrap().bytes, [0; 10]);
    snapshot.verify_ram(&mut |_, _| ()).unwrap();
}

/// Makes a manifest wrong.
type Spoil = fn(&mut Manifest);

#[test]
fn an_impossible_manifest_is_refused() {
    let cases: [(&str, Spoil); 16] = [
        ("starts before the one ahead", |m| m.ram.ranges[1].gpa = 0x2000),
        ("starts before the one ahead", |m| m.ram.ranges.swap(0, 1)),
        ("whole 4 KiB pages", |m| m.ram.ranges[1].gpa += 1),
        ("whole 4 KiB pages", |m| m.ram.ranges[1].len += 1),
        ("whole 4 KiB pages", |m| m.ram.ranges[1].len = 0),
        ("whole 4 KiB pages", |m| m.ram.ranges[1].gpa = u64::MAX - 0xfff),
        ("whole 4 KiB pages", |m| m.ram.ranges[1].len = u64::MAX - 0xfff),
        ("number of RAM ranges is 0", |m| m.ram.ranges.clear()),
        ("number of RAM ranges is 65", |m| {
            m.ram.ranges = (0..65).map(|n| RamRange { gpa: n << 20, len: 4096 }).collect();
        }),
        ("RAM in bytes", |m| m.ram.bytes += 4096),
        ("page size is 0", |m| m.ram.page_size = 0),
        ("chunk size is 0", |m| m.ram.chunk_size = 0),
        ("digest is md5", |m| m.ram.digest = "md5".to_owned()),
        ("number of vCPUs is 4294967295", |m| m.vcpus = u32::MAX),
        ("writer", |m| m.about.writer = "\x1b]0;owned\x07".to_owned()),
        ("writer", |m| m.about.writer = "x".repeat(100_000)),
    ];
    for (expected, spoil) in cases {
        let mut bad = manifest();
        spoil(&mut bad);
        let forge = Forge { manifest: postcard::to_stdvec(&bad).unwrap(), ..Forge::new(&manifest()) };
        let message = complaint(&forge);
        assert!(message.contains(expected), "expected {expected:?}, found {message:?}");
    }
}

#[test]
fn a_manifest_and_headers_that_differ_are_refused() {
    let cases: [(&str, Spoil); 4] = [
        ("differ at GPA 0x200000000", |m| m.ram.ranges[1].gpa = 2 << 32),
        ("differ at GPA 0x0", |m| {
            m.ram.ranges[0].len -= 4096;
            m.ram.bytes -= 4096;
        }),
        ("differ at GPA 0x100000000", |m| {
            let gone = m.ram.ranges.pop().unwrap();
            m.ram.bytes -= gone.len;
        }),
        ("NT_PRSTATUS notes: 672 bytes long, expected 1008", |m| m.vcpus += 1),
    ];
    for (expected, spoil) in cases {
        let mut bad = manifest();
        spoil(&mut bad);
        let forge = Forge { manifest: postcard::to_stdvec(&bad).unwrap(), ..Forge::new(&manifest()) };
        let message = complaint(&forge);
        assert!(message.contains(expected), "expected {expected:?}, found {message:?}");
    }
}

#[test]
fn a_difference_to_a_parent_says_what_changed() {
    let mut bad = manifest();
    bad.parent = Some(GenerationId([0xab; 16]));
    for forge in [Forge::new(&bad), Forge::packed(&bad, 4096)] {
        let message = complaint(&forge);
        assert!(message.contains("the list of changed pages is wrong: there is none"), "{message}");
    }
    let message = complaint(&Forge::packed(&manifest(), 4096));
    assert!(message.contains("changed pages only, and its manifest names no parent"), "{message}");
}

/// A file of the tiny machine, which has four pages in two ranges, that holds some of them and has a list.
fn difference(version: u32, bits: u8, held: u64) -> Forge {
    let list = postcard::to_stdvec(&(0u64, "p", 4u64, vec![bits])).unwrap();
    let (len, crc) = (list.len() as u32, crc32fast::hash(&list));
    let mut manifest = manifest();
    manifest.parent = Some(GenerationId([0xab; 16]));
    manifest.sections = vec![SectionEntry { name: "delta".to_owned(), version, len, crc }];
    Forge { state: list, ..Forge::packed(&manifest, held) }
}

#[test]
fn a_list_of_other_pages_than_the_file_holds_is_refused() {
    let good = difference(2, 0b1010, 2 * 4096);
    verify_link(&good.file()).unwrap().verify_ram(&mut |_, _| ()).unwrap();
    let none = difference(2, 0, 0);
    verify_link(&none.file()).unwrap().verify_ram(&mut |_, _| ()).unwrap();
    for (bits, held) in [(0b1010, 1), (0b1010, 3), (0, 1), (0b1111, 0), (0b1111, 1 << 10)] {
        let bad = difference(2, bits, held * 4096);
        let message = refusal(&bad.file());
        let expected = format!("it has {} pages, and the file holds {held}", bits.count_ones());
        assert!(message.contains(&expected), "{message}");
    }
    // All four, where a full snapshot has them.
    let mut unpacked = difference(2, 0b1111, 4 * 4096);
    (unpacked.packed, unpacked.loads) = (None, manifest().ram.ranges);
    unpacked.table = Forge::new(&manifest()).table;
    let message = refusal(&unpacked.file());
    assert!(message.contains("the file's RAM is not packed"), "{message}");
}

#[test]
fn a_difference_of_the_older_form_is_refused_by_its_version() {
    let mut old = difference(1, 0b1010, 0);
    (old.packed, old.loads) = (None, manifest().ram.ranges);
    old.table = Forge::new(&manifest()).table;
    let message = refusal(&old.file());
    assert!(message.contains("section delta has version 1, expected 2"), "{message}");
    assert!(!message.contains('\n'));
}

#[test]
fn packed_pages_that_lie_are_refused() {
    let good = difference(2, 0b1010, 2 * 4096);
    let file = good.file();
    let packed = 64 + 56;
    let cases: [(usize, &[u8], &str); 9] = [
        (packed, &[1, 0, 0, 0], "p_flags"),
        (packed, &[0x42], "p_type"),
        (packed + 4, &[7], "p_flags"),
        (packed + 8, &[0xff; 8], "p_offset"),
        (packed + 16, &[0, 0x10], "p_vaddr"),
        (packed + 24, &[0, 0x10], "p_paddr"),
        (packed + 32, &[0xff; 8], "p_filesz"),
        (packed + 32, &[0, 0, 0, 0, 0, 0, 0x10], "part with the changed pages ends at byte"),
        (packed + 40, &[0, 0x20], "p_memsz"),
    ];
    for (offset, bytes, field) in cases {
        let mut bad = file.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        let message = refusal(&bad);
        assert!(message.contains(field), "expected {field}, found {message:?}");
    }
    let message = refusal(&file[..file.len() - 1]);
    assert!(message.contains("part with the changed pages ends at byte"), "{message}");
    assert!(refusal(&[&file[..], &[0]].concat()).contains("RAM ends at byte"));
    for len in [0, 7, 9, 16] {
        let message = refusal(&Forge { table: vec![0; len], ..good.clone() }.file());
        assert!(message.contains(&format!("chunk table: {len} bytes long, expected 8")), "{message}");
    }
}

fn refusal(file: &[u8]) -> String {
    chain(&verify_link(file).unwrap_err())
}

/// The two RAM ranges of the tiny machine have four pages.
#[test]
fn a_list_of_other_pages_than_ram_has_is_refused() {
    let complaint_about = |parent, hint: &str, pages: u64, bits: Vec<u8>| {
        let held = bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>() * 4096;
        let list = postcard::to_stdvec(&(0u64, hint, pages, bits)).unwrap();
        let (len, crc) = (list.len() as u32, crc32fast::hash(&list));
        let mut bad = manifest();
        bad.parent = parent;
        bad.sections = vec![SectionEntry { name: "delta".to_owned(), version: 2, len, crc }];
        let forge = if parent.is_some() { Forge::packed(&bad, held) } else { Forge::new(&bad) };
        complaint(&Forge { state: list, ..forge })
    };
    let parent = Some(GenerationId([0xab; 16]));
    for (pages, bits) in [(5, vec![0]), (4, vec![]), (4, vec![0, 0]), (4, vec![0x10]), (u64::MAX, vec![0])] {
        let message = complaint_about(parent, "p", pages, bits);
        assert!(message.contains("not of as many pages"), "{message}");
    }
    assert!(complaint_about(parent, "a\nb", 4, vec![0]).contains("no line of text"));
    assert!(complaint_about(parent, &"x".repeat(5000), 4, vec![0]).contains("no line of text"));
    assert!(complaint_about(Some(GenerationId([7; 16])), "p", 4, vec![0]).contains("its own parent"));
    assert!(complaint_about(None, "p", 4, vec![0]).contains("but no parent"));
    assert!(
        complaint_about(parent, "p", 4, vec![1]).contains(&format!("needs its parent {}", "ab".repeat(16)))
    );
}

#[test]
fn sections_that_do_not_fill_the_state_are_refused() {
    let entry = |name: &str, len| SectionEntry { name: name.to_owned(), version: 1, len, crc: 0 };
    let mut bad = manifest();
    bad.sections = vec![entry("a", 10)];
    assert!(complaint(&Forge::new(&bad)).contains("section a: CRC-32"));
    let short = Forge { state: vec![0; 9], ..Forge::new(&bad) };
    assert!(complaint(&short).contains("machine state: 9 bytes long, expected 10"));
    bad.sections = vec![entry("a", 0), entry("a", 0)];
    assert!(complaint(&Forge::new(&bad)).contains("two sections are named a"));
    bad.sections = vec![entry("a", u32::MAX); 1];
    let absurd = Forge { manifest: postcard::to_stdvec(&bad).unwrap(), ..Forge::new(&manifest()) };
    assert!(complaint(&absurd).contains("machine state in bytes is 4294967295"));
}

#[test]
fn a_table_of_another_length_is_refused() {
    for len in [0, 8, 15, 17, 24] {
        let forge = Forge { table: vec![0; len], ..Forge::new(&manifest()) };
        let message = complaint(&forge);
        assert!(message.contains("chunk table") && message.contains("expected 16"), "{message}");
    }
}

#[test]
fn a_manifest_that_does_not_decode_is_refused() {
    let mut longer = Forge::new(&manifest());
    longer.manifest.push(0);
    assert!(complaint(&longer).contains("1 bytes after its end"));
    let mut shorter = Forge::new(&manifest());
    shorter.manifest.pop();
    assert!(complaint(&shorter).contains("does not decode"));
    let absurd = Forge { manifest: vec![0xff; 100], ..Forge::new(&manifest()) };
    assert!(complaint(&absurd).contains("does not decode"));
}

/// Makes a fixed header wrong.
type SpoilHeader = fn(&mut [u8]);

#[test]
fn a_header_that_lies_is_refused() {
    let cases: [(&str, SpoilHeader); 6] = [
        ("magic", |header| header[1] = b'X'),
        ("format version 2; this program reads version 1", |header| header[8] = 2),
        ("notes for debuggers: 672 bytes long", |header| header[12..16].fill(0xff)),
        ("manifest: ", |header| header[20..24].fill(0xff)),
        ("chunk table: 16 bytes long, expected 4294967295", |header| header[28..32].fill(0xff)),
        ("machine state: 0 bytes long, expected 4294967295", |header| header[36..40].fill(0xff)),
    ];
    for (expected, spoil_header) in cases {
        let message = complaint(&Forge { spoil_header, ..Forge::new(&manifest()) });
        assert!(message.contains(expected), "expected {expected:?}, found {message:?}");
    }
}

#[test]
fn a_core_without_our_notes_and_one_with_two_are_refused() {
    let again = note(b"VMMSNAP\0", 0x534e_4151, b"");
    let message = complaint(&Forge { more_notes: again, ..Forge::new(&manifest()) });
    assert!(message.contains("exactly one manifest note") && message.contains("found 2"), "{message}");
    let foreign = note(b"VMCOREINFO\0", 0, b"OSRELEASE=6.1.0\n");
    let message = complaint(&Forge { more_notes: foreign, ..Forge::new(&manifest()) });
    assert!(message.contains("belongs there"), "{message}");
    let word: &[u8] = b"OSRELEASE=6.1.0\n";
    let told = Forge { vmcoreinfo: Some(word), ..Forge::new(&manifest()) };
    assert_eq!(verify(&told.file()).unwrap().vmcoreinfo(), Some(word));
    let mut more = Forge { vmcoreinfo: Some(word), ..Forge::new(&manifest()) };
    more.prstatus.push(b"not registers".to_vec());
    assert!(complaint(&more).contains("NT_PRSTATUS notes: 685 bytes long, expected 672"));
    let bytes = Forge::new(&manifest()).file();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut stranger = bytes.clone();
    for at in (0..bytes.len() - 7).filter(|at| &bytes[*at..at + 7] == b"VMMSNAP") {
        stranger[at] = b'X';
    }
    assert!(text.contains("VMMSNAP"));
    let message = chain(&verify(&stranger).unwrap_err());
    assert!(message.contains("exactly one fixed header note"), "{message}");
}

#[test]
fn absurd_program_headers_are_refused() {
    let good = Forge::new(&manifest()).file();
    let (note, load) = (64, 64 + 56);
    let cases: [(usize, &[u8], &str); 12] = [
        (56, &[0xff, 0xff], "e_phnum"),
        (56, &[0, 0], "e_phnum"),
        (56, &[1, 0], "e_phnum"),
        (note, &[1, 0], "p_type"),
        (note + 8, &[0xff; 8], "p_offset"),
        (note + 32, &[0xff; 16], "p_filesz"),
        (note + 32, &[0; 16], "p_filesz"),
        (load, &[4, 0], "p_type"),
        (load + 8, &[0xff; 8], "p_offset"),
        (load + 16, &[0xff; 16], "p_paddr"),
        (load + 32, &[0xff; 16], "p_filesz"),
        (load + 38, &[0x10], "p_memsz"),
    ];
    for (offset, bytes, field) in cases {
        let mut bad = good.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        let message = chain(&verify(&bad).unwrap_err());
        assert!(message.contains(field), "expected {field}, found {message:?}");
    }
}

#[test]
fn a_terabyte_of_holes_takes_no_memory() {
    let mut big = manifest();
    big.ram.ranges = vec![RamRange { gpa: 0, len: 1 << 40 }];
    big.ram.bytes = 1 << 40;
    let forge = Forge::new(&big);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), forge.head()).unwrap();
    file.as_file().set_len(forge.head().len() as u64 + (1 << 40)).unwrap();
    let message = chain(&UnverifiedSnapshot::open(file.path()).unwrap().verify().unwrap_err());
    assert!(message.contains("chunk table: 0 bytes long, expected 8388608"), "{message}");
}
