//! Chains of incremental snapshots: written, found again, broken.

use crate::machine::{Machine, chain as words};
use snapshot::{
    CHUNK_SIZE, Chain, ChainError, Contents, Delta, GenerationId, PAGE_SIZE, PageSet, Parent, Summary,
    UnverifiedSnapshot, delta,
};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A machine, and the chain of files that it was written to.
struct Scene {
    dir: tempfile::TempDir,
    machine: Machine,
    files: Vec<PathBuf>,
}

impl Scene {
    /// A full snapshot in a directory of its own.
    fn new() -> Self {
        let mut scene =
            Self { dir: tempfile::tempdir().unwrap(), machine: Machine::small(), files: Vec::new() };
        let file = scene.dir.path().join("0");
        scene.machine.write(&file).unwrap();
        scene.files.push(file);
        scene
    }

    /// Changes pages, and writes what changed.
    fn change(&mut self, pages: &[u64]) -> Summary {
        let number = self.files.len();
        for gpa in pages {
            self.machine.ram.pages.insert(*gpa, [number as u8; 4096]);
        }
        self.write(&self.dir.path().join(number.to_string()), number as u8, pages)
    }

    fn write(&mut self, file: &Path, id: u8, pages: &[u64]) -> Summary {
        let Machine { about, vcpus, sections, ram, .. } = &mut self.machine;
        // The full one has another.
        about.generation = GenerationId([100 + id; 16]);
        let parent = UnverifiedSnapshot::open(self.files.last().unwrap()).unwrap().verify_link().unwrap();
        let mut changed = PageSet::none_of(delta::pages(&ram.ranges));
        for gpa in pages {
            let page = delta::page_number(&ram.ranges, *gpa).unwrap();
            changed.insert(page..page + 1);
        }
        let delta = Delta { parent: Parent::of(&parent, file), changed };
        let about = about.clone();
        let contents = Contents { about, vcpus, vmcoreinfo: None, sections, ram, delta: Some(&delta) };
        let summary = snapshot::write(file, &contents, &mut |_, _| ()).unwrap();
        self.files.push(file.to_owned());
        summary
    }

    fn last(&self) -> &Path {
        self.files.last().unwrap()
    }

    /// What the files say RAM is, against what it is.
    fn check(&self, chain: &Chain) {
        let mut at = 0;
        for piece in chain.pieces() {
            assert!(piece.gpa >= at, "pieces out of order");
            at = piece.gpa + piece.len;
            let mut bytes = vec![0; piece.len as usize];
            chain.links()[piece.link].file().read_exact_at(&mut bytes, piece.offset).unwrap();
            assert!(bytes == self.machine.ram.bytes(piece.gpa, piece.len as usize), "GPA {:#x}", piece.gpa);
        }
        let covered: u64 = chain.pieces().iter().map(|piece| piece.len).sum();
        assert_eq!(covered, chain.top().manifest().ram.bytes);
    }

    fn error(&self) -> String {
        words(&Chain::open(self.last()).unwrap_err())
    }
}

#[test]
fn a_chain_has_all_of_ram_and_each_link_only_what_changed() {
    let mut scene = Scene::new();
    scene.check(&Chain::open(scene.last()).unwrap());
    let summary = scene.change(&[0x7000, 0x9000, CHUNK_SIZE, (1 << 32) + 0x1000]);
    assert_eq!(summary.data_bytes, 4 * PAGE_SIZE);
    scene.change(&[0x7000, 0x8000]);
    // A page that is zero now.
    scene.machine.ram.pages.remove(&CHUNK_SIZE);
    let number = scene.files.len();
    let summary = scene.write(&scene.dir.path().join("zero"), number as u8, &[CHUNK_SIZE]);
    assert_eq!(summary.data_bytes, 0);
    let chain = Chain::open(scene.last()).unwrap();
    assert_eq!(chain.links().len(), 4);
    scene.check(&chain);
    for link in chain.links() {
        link.verify_ram(&mut |_, _| ()).unwrap();
    }
    // Its pages are all there is of RAM in the file, one behind the other.
    let first = &chain.links()[2];
    assert_eq!((first.ram_bytes(), first.ram().len()), (4 * PAGE_SIZE, 1));
    assert_eq!(first.file_len(), first.ram()[0].offset + 4 * PAGE_SIZE);
    let offsets: Vec<_> =
        chain.pieces().iter().filter(|piece| piece.link == 2).map(|piece| piece.offset).collect();
    let start = first.ram()[0].offset;
    assert_eq!(offsets, [1, 3].map(|page| start + page * PAGE_SIZE), "of 0x9000, and of the second range");
    // Of a page that is zero there is nothing.
    assert_eq!((chain.top().zero_bytes().unwrap(), chain.top().ram_bytes()), (PAGE_SIZE, PAGE_SIZE));
    assert!(fs::metadata(&scene.files[1]).unwrap().blocks() <= (first.file_len() / 512).next_multiple_of(8));
}

/// More than one thread, and more than one chunk: each page is still where the list has it.
#[test]
fn many_scattered_pages_are_found_again() {
    let mut scene = Scene::new();
    scene.machine = Machine::with_ram(&[(0, 200 * CHUNK_SIZE), (1 << 32, 3 * CHUNK_SIZE)], &[]);
    scene.machine.write(&scene.files[0]).unwrap();
    let all: Vec<u64> =
        (0..200 * CHUNK_SIZE).chain(1 << 32..(1 << 32) + 3 * CHUNK_SIZE).step_by(2 * 4096).collect();
    scene.change(&all);
    let summary = scene.change(&all.iter().step_by(3).copied().collect::<Vec<_>>());
    assert_eq!(summary.ram_bytes, 203 * CHUNK_SIZE);
    let chain = Chain::open(scene.last()).unwrap();
    scene.check(&chain);
    assert_eq!(chain.links()[1].ram_bytes(), all.len() as u64 * PAGE_SIZE);
    chain.verify_ram(&mut |_, _| ()).unwrap();
}

#[test]
fn no_change_is_a_difference_too() {
    let mut scene = Scene::new();
    let summary = scene.change(&[]);
    assert_eq!((summary.data_bytes, summary.ram_bytes), (0, 2 * CHUNK_SIZE + 0x5000));
    let chain = Chain::open(scene.last()).unwrap();
    scene.check(&chain);
    assert_eq!((chain.top().ram_bytes(), chain.top().digests().len()), (0, 0));
    chain.verify_ram(&mut |_, _| ()).unwrap();
}

#[test]
fn a_link_is_another_if_its_pages_are_others() {
    let mut scene = Scene::new();
    let [one, other] = [0x3000, 0x4000].map(|gpa| {
        scene.machine.ram.pages.insert(gpa, [9; 4096]);
        let file = scene.dir.path().join(format!("{gpa:x}"));
        scene.write(&file, 1, &[gpa]);
        scene.files.pop();
        UnverifiedSnapshot::open(&file).unwrap().verify_link().unwrap()
    });
    assert_eq!(one.digests(), other.digests());
    assert_ne!(one.ram_digest(), other.ram_digest());
}

#[test]
fn sixteen_links_hold_and_a_chain_has_an_end() {
    let mut scene = Scene::new();
    for link in 1..snapshot::chain::CHAIN_MAX as u64 {
        scene.change(&[link % 16 * 0x1000, 0x2000]);
        if link == 16 {
            scene.check(&Chain::open(scene.last()).unwrap());
        }
    }
    scene.check(&Chain::open(scene.last()).unwrap());
    scene.change(&[0]);
    assert!(scene.error().contains("a chain of more than 64 snapshots"), "{}", scene.error());
}

#[test]
fn a_full_reader_refuses_a_link_by_its_parent() {
    let mut scene = Scene::new();
    scene.change(&[0]);
    let error = UnverifiedSnapshot::open(scene.last()).unwrap().verify().unwrap_err();
    assert!(
        words(&error).contains(&format!("needs its parent {}", GenerationId([7; 16]))),
        "{}",
        words(&error)
    );
}

#[test]
fn a_chain_that_is_carried_elsewhere_is_found_there() {
    let mut scene = Scene::new();
    scene.change(&[0]);
    let elsewhere = tempfile::tempdir().unwrap();
    // Written into another directory, so that the parent is known by its absolute path.
    let file = elsewhere.path().join("2");
    scene.write(&file, 2, &[0x3000]);
    scene.check(&Chain::open(scene.last()).unwrap());
    for name in ["0", "1"] {
        fs::rename(scene.dir.path().join(name), elsewhere.path().join(name)).unwrap();
    }
    scene.check(&Chain::open(scene.last()).unwrap());
}

#[test]
fn a_parent_that_is_missing_or_another_is_named() {
    let mut scene = Scene::new();
    scene.change(&[0]);
    let [base, child] = [scene.files[0].clone(), scene.files[1].clone()];
    let aside = scene.dir.path().join("aside");
    fs::rename(&base, &aside).unwrap();
    let error = scene.error();
    assert!(error.contains("which is not there") && error.contains(base.to_str().unwrap()), "{error}");
    // Of another id.
    scene.machine.about.generation = GenerationId([0x55; 16]);
    scene.machine.write(&base).unwrap();
    let error = scene.error();
    assert!(error.contains(&format!("is snapshot {}", GenerationId([0x55; 16]))), "{error}");
    // Of the same id, with other RAM.
    scene.machine.about.generation = GenerationId([7; 16]);
    scene.machine.write(&base).unwrap();
    assert!(scene.error().contains("one of that id with other RAM"), "{}", scene.error());
    // No snapshot at all.
    fs::write(&base, "hello").unwrap();
    assert!(scene.error().contains("is not a usable snapshot"), "{}", scene.error());
    // Another kind of machine.
    Machine::tiny().write(&base).unwrap();
    assert!(scene.error().contains("with other RAM"), "{}", scene.error());
    fs::rename(&aside, &base).unwrap();
    assert_eq!(Chain::open(&child).unwrap().links().len(), 2);
}

/// No writer of ours makes one, since an id is random: here a parent is replaced by a child of its child.
#[test]
fn a_loop_is_refused() {
    let mut scene = Scene::new();
    scene.change(&[0]);
    let first = scene.files[1].clone();
    scene.change(&[0x1000]);
    // A file of the id of the first, which is a difference to the second.
    let forged = scene.dir.path().join("forged");
    scene.write(&forged, 1, &[]);
    fs::rename(&forged, &first).unwrap();
    scene.files.pop();
    let error = Chain::open(scene.last()).unwrap_err();
    let refused = matches!(error, ChainError::Loop { .. } | ChainError::Wrong { .. });
    assert!(refused, "{}", words(&error));
}

#[test]
fn damage_to_any_link_is_found() {
    let mut scene = Scene::new();
    scene.change(&[0x7000]);
    let bytes = fs::read(scene.last()).unwrap();
    let chain = Chain::open(scene.last()).unwrap();
    let piece = chain.pieces().into_iter().find(|piece| piece.link == 0).unwrap();
    let mut damaged = bytes.clone();
    damaged[piece.offset as usize + 5] ^= 1;
    fs::write(scene.last(), &damaged).unwrap();
    let chain = Chain::open(scene.last()).unwrap();
    let error = words(&chain.top().verify_ram(&mut |_, _| ()).unwrap_err());
    assert!(
        error.contains("the chunk of changed pages from GPA 0x7000 on (4096 bytes) has digest"),
        "{error}"
    );
    // In the list of pages, which is near the end of the notes.
    let start = chain.top().ram()[0].offset as usize;
    for at in 0..start {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        fs::write(scene.last(), &damaged).unwrap();
        assert!(Chain::open(scene.last()).is_err(), "byte {at} may be anything");
    }
}
