//! Random bytes, random damage, random parts under right CRCs: an error or a snapshot, never a panic.

use crate::{
    forge::Forge,
    forged::manifest,
    machine::{Machine, verify_link},
};
use proptest::{collection::vec, prelude::*};
use snapshot::{GenerationId, SectionEntry};
use std::sync::LazyLock;

static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| Machine::tiny().file());
static FORGE: LazyLock<Forge> = LazyLock::new(|| Forge::new(&manifest()));

/// A byte at an offset; most offsets are in the headers and at the start of the notes.
fn damage() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let offset = prop_oneof![0usize..240, 0usize..4096, 0..FILE.len()];
    vec((offset, any::<u8>()), 1..12)
}

/// Reads as much as a caller could.
fn use_file(bytes: &[u8]) {
    if let Ok(snapshot) = verify_link(bytes) {
        let pages = snapshot::delta::pages(&snapshot.manifest().ram.ranges);
        let changed = snapshot.delta().into_iter().flat_map(|delta| delta.changed.runs(0..pages));
        assert!(changed.map(|run| run.end).max() <= Some(pages));
        let _ = snapshot.verify_ram(&mut |_, _| ());
        assert!(snapshot.zero_bytes().unwrap() <= snapshot.manifest().ram.bytes);
        for section in snapshot.sections() {
            let _ = section.decode::<Vec<String>>(section.version);
        }
        for mapped in snapshot.ram() {
            assert!(mapped.offset + mapped.range.len <= bytes.len() as u64);
        }
    }
}

/// A file that says it is a difference to another, with this list of pages, and so many of them.
fn link(list: Vec<u8>, held: u64) -> Vec<u8> {
    let mut manifest = manifest();
    manifest.parent = Some(GenerationId([0xab; 16]));
    let crc = crc32fast::hash(&list);
    manifest.sections = vec![SectionEntry {
        name: snapshot::delta::DELTA.to_owned(),
        version: 2,
        len: list.len() as u32,
        crc,
    }];
    Forge { state: list, ..Forge::packed(&manifest, held * 4096) }.file()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn random_bytes(bytes in vec(any::<u8>(), 0..9000)) {
        use_file(&bytes);
    }

    #[test]
    fn random_bytes_after_a_good_elf_header(bytes in vec(any::<u8>(), 0..9000), phnum in 0u8..80) {
        let mut file = FILE[..64].to_vec();
        file[56] = phnum;
        file.extend(bytes);
        use_file(&file);
    }

    #[test]
    fn random_damage(damage in damage(), len in 0..FILE.len() * 2) {
        let mut bytes = FILE.clone();
        for (offset, byte) in damage {
            bytes[offset] = byte;
        }
        use_file(&bytes);
        bytes.truncate(len);
        use_file(&bytes);
    }

    #[test]
    fn random_parts(manifest in vec(any::<u8>(), 0..300), state in vec(any::<u8>(), 0..50)) {
        use_file(&Forge { manifest, state, ..FORGE.clone() }.file());
    }

    #[test]
    fn random_lists_of_pages(list in vec(any::<u8>(), 0..60), held in 0u64..5) {
        use_file(&link(list, held));
    }

    #[test]
    fn lists_of_any_pages(hint in ".{0,12}", pages in 3u64..6, bits in vec(0u8..32, 0..3), held in 0u64..5) {
        use_file(&link(postcard::to_stdvec(&(1u64, hint, pages, bits)).unwrap(), held));
    }

    #[test]
    fn a_damaged_manifest_under_a_right_crc(at in any::<prop::sample::Index>(), byte: u8) {
        let mut forge = FORGE.clone();
        let at = at.index(forge.manifest.len());
        forge.manifest[at] = byte;
        use_file(&forge.file());
    }
}
