//! What is written is read.

use crate::machine::{Machine, chain, original, restored};
use snapshot::{CHUNK_SIZE, Section, UnverifiedSnapshot, WriteError, publish};
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

fn open(path: &Path) -> snapshot::Snapshot {
    UnverifiedSnapshot::open(path).unwrap().verify().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_machine_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let machine = Machine::small();
    let summary = machine.write(&path).unwrap();
    let snapshot = open(&path);
    assert_eq!(snapshot.manifest().about, machine.about);
    assert_eq!(snapshot.manifest().vcpus, 2);
    assert_eq!(snapshot.vmcoreinfo(), machine.vmcoreinfo);
    assert_eq!(snapshot.manifest().ram.ranges, machine.ram.ranges);
    let sections: Vec<_> = machine.sections.iter().map(Section::as_ref).collect();
    assert_eq!(snapshot.sections().collect::<Vec<_>>(), sections);
    assert_eq!(snapshot.section("vcpu 0").unwrap().decode::<[u64; 9]>(4).unwrap(), [0x1234_5678; 9]);
    assert!(snapshot.section("vcpu 1").is_none());
    assert_eq!(restored(&snapshot), original(&machine));
    assert_eq!(summary.ram_bytes, 2 * CHUNK_SIZE + 0x5000);
    assert_eq!(summary.data_bytes, 5 * 4096);
    assert_eq!(summary.file_len, fs::metadata(&path).unwrap().len());
    assert_eq!(names(dir.path()), ["a.snap"]);
}

/// Enough RAM for several threads.
fn large() -> Machine {
    let page = |chunk: u64| chunk * CHUNK_SIZE + chunk % 256 * 4096;
    let pages: Vec<_> = (0..150).map(page).chain((0..9).map(|chunk| (1 << 32) + page(chunk))).collect();
    Machine::with_ram(&[(0, 150 * CHUNK_SIZE), (1 << 32, 9 * CHUNK_SIZE)], &pages)
}

#[test]
fn so_does_one_that_several_threads_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let (machine, mut heard) = (large(), Vec::new());
    let summary = machine.write_telling(&path, &mut |done, total| heard.push((done, total))).unwrap();
    assert_eq!((summary.ram_bytes, summary.data_bytes), (159 * CHUNK_SIZE, 159 * 4096));
    assert_eq!(heard, (1..=159).map(|n| (n * CHUNK_SIZE, 159 * CHUNK_SIZE)).collect::<Vec<_>>());
    let snapshot = open(&path);
    snapshot.verify_ram(&mut |_, _| ()).unwrap();
    assert_eq!(restored(&snapshot), original(&machine));
}

#[test]
fn ram_that_one_of_several_threads_cannot_read_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = large();
    machine.ram.broken_at = Some(70 * CHUNK_SIZE);
    let error = machine.write(&dir.path().join("a.snap")).unwrap_err();
    assert!(matches!(error, WriteError::Ram { gpa, .. } if gpa == 70 * CHUNK_SIZE), "{error}");
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn zero_pages_are_holes_and_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let machine = Machine::with_ram(&[(0, 64 * CHUNK_SIZE)], &[0, 40 * CHUNK_SIZE]);
    let summary = machine.write(&path).unwrap();
    let allocated = fs::metadata(&path).unwrap().blocks() * 512;
    assert!(allocated <= 64 << 10, "{allocated} bytes for two pages and the notes");
    assert_eq!(summary.allocated, allocated);
    let snapshot = open(&path);
    // A file system's block may be larger than a page.
    let holes = snapshot.zero_bytes().unwrap();
    assert!((62 * CHUNK_SIZE..=summary.zero_bytes()).contains(&holes), "{holes}");
    let mut heard = Vec::new();
    let checked = snapshot.verify_ram(&mut |done, total| heard.push((done, total))).unwrap();
    assert_eq!(checked.hole_bytes, 62 * CHUNK_SIZE);
    assert_eq!(heard.len(), 64);
    assert_eq!(heard[63], (64 * CHUNK_SIZE, 64 * CHUNK_SIZE));
}

#[test]
fn the_first_bad_chunk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    Machine::small().write(&path).unwrap();
    let snapshot = open(&path);
    for (mapped, chunk) in [(snapshot.ram()[0], 2 * CHUNK_SIZE), (snapshot.ram()[1], 1 << 32)] {
        let offset = mapped.offset + (chunk - mapped.range.gpa) + 0x1fff;
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        let error = open(&path).verify_ram(&mut |_, _| ()).unwrap_err();
        assert!(error.to_string().contains(&format!("GPA {chunk:#x}")), "{error}");
        file.write_all_at(&byte, offset).unwrap();
    }
    open(&path).verify_ram(&mut |_, _| ()).unwrap();
}

#[test]
fn a_byte_written_into_a_hole_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    Machine::small().write(&path).unwrap();
    let offset = open(&path).ram()[0].offset + CHUNK_SIZE + 5;
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[1], offset).unwrap();
    let error = open(&path).verify_ram(&mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("GPA 0x100000"), "{error}");
}

#[test]
fn a_new_snapshot_replaces_an_old_one_also_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (path, link) = (dir.path().join("a.snap"), dir.path().join("link"));
    fs::write(&path, "old").unwrap();
    std::os::unix::fs::symlink("a.snap", &link).unwrap();
    Machine::small().write(&link).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    open(&path);
    assert_eq!(names(dir.path()).len(), 2);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn broken_ram_leaves_the_old_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    fs::write(&path, "old").unwrap();
    let mut machine = Machine::small();
    machine.ram.broken_at = Some(CHUNK_SIZE);
    let error = machine.write(&path).unwrap_err();
    assert_eq!(chain(&error), "cannot read guest RAM at GPA 0x100000: the RAM is broken");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["a.snap"]);
}

#[test]
fn what_is_no_regular_file_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let sub = dir.path().join("sub");
    fs::create_dir(&sub).unwrap();
    for (path, kind) in [(sub.as_path(), "a directory"), (Path::new("/dev/null"), "a device")] {
        let message = Machine::small().write(path).unwrap_err().to_string();
        assert!(message.contains(kind) && message.contains(path.to_str().unwrap()), "{message}");
    }
    for path in ["/", "..", ""] {
        assert!(Machine::small().write(Path::new(path)).is_err(), "{path}");
    }
    let message = chain(&Machine::small().write(&dir.path().join("no/a.snap")).unwrap_err());
    assert!(message.contains("no/a.snap") && message.contains("No such file"), "{message}");
    assert_eq!(names(dir.path()), ["sub"]);
    assert!(names(&sub).is_empty());
}

#[test]
fn an_unfinished_file_has_no_name() {
    let dir = tempfile::tempdir().unwrap();
    let new = publish::NewFile::create(&dir.path().join("a.snap")).unwrap();
    assert!(names(dir.path()).is_empty());
    new.publish().unwrap();
    assert_eq!(names(dir.path()), ["a.snap"]);
}

#[test]
fn notes_longer_than_the_format_allows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::small();
    machine.sections.push(Section { name: "big".to_owned(), version: 1, bytes: vec![0; 4 << 20] });
    let error = machine.write(&dir.path().join("a.snap")).unwrap_err();
    assert!(matches!(error, WriteError::NotesTooLong { .. }), "{error}");
    let huge = Machine::with_ram(&[(0, 1 << 40)], &[]).write(&dir.path().join("a.snap")).unwrap_err();
    assert!(matches!(huge, WriteError::NotesTooLong { .. }), "{huge}");
    assert!(names(dir.path()).is_empty());
}

/// Makes a machine impossible.
type Spoil = fn(&mut Machine);

#[test]
fn a_machine_that_could_not_be_read_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let spoil: [(&str, Spoil); 6] = [
        ("number of vCPUs is 0", |machine| machine.vcpus.clear()),
        ("number of RAM ranges is 0", |machine| machine.ram.ranges.clear()),
        ("0x2064", |machine| machine.ram.ranges[1].len += 100),
        ("starts before", |machine| machine.ram.ranges[1].gpa = 4096),
        ("two sections are named serial", |machine| machine.sections[1].name = "serial".to_owned()),
        ("device name", |machine| machine.about.devices.push("\x1b[2J".to_owned())),
    ];
    for (expected, spoil) in spoil {
        let mut machine = Machine::small();
        spoil(&mut machine);
        let message = chain(&machine.write(&path).unwrap_err());
        assert!(message.contains(expected), "{message}");
    }
    assert!(names(dir.path()).is_empty());
}
