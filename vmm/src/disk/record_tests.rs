//! A disk, a snapshot's record of it, and what has happened to it since.

use super::*;
use std::os::unix::fs::FileExt;

const SIZE: u64 = 3 << 20;

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// A disk with a few bytes in its second MiB, and the rest a hole.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(b"old", 1 << 20).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn disk(&self) -> Disk {
        let file = DiskFile::open(&self.path("disk"), false).unwrap();
        Disk { id: "data".to_owned(), file, engine: EngineChoice::Auto }
    }

    fn record(&self, care: DiskCare) -> Vec<DiskRecord> {
        let generation = GenerationId::random().unwrap();
        let (records, unclaimed) = record(&[self.disk()], care, &self.path("snap"), &generation).unwrap();
        unclaimed.claim();
        check(&records).unwrap();
        records
    }

    fn open(&self, records: &[DiskRecord]) -> Result<Disk, String> {
        self.open_at(records, &[], false)
    }

    fn open_at(&self, records: &[DiskRecord], places: &[&str], allow: bool) -> Result<Disk, String> {
        let place = |name: &&str| DiskPlace {
            id: "data".to_owned(),
            path: self.path(name),
            engine: EngineChoice::Auto,
        };
        let places: Vec<_> = places.iter().map(place).collect();
        let opened = super::open(records, &self.path("snap"), &places, allow);
        opened.map(|mut disks| disks.remove(0)).map_err(|error| crate::complaint::one_line(&error))
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let file = fs::File::options().write(true).open(self.path(name)).unwrap();
        file.write_all_at(bytes, 1 << 20).unwrap();
    }
}

fn text(disk: &Disk) -> [u8; 3] {
    let mut bytes = [0; 3];
    disk.file.file.read_exact_at(&mut bytes, 1 << 20).unwrap();
    bytes
}

const KEEP: DiskCare = DiskCare { keep: true, digest: false, at_once: false };
const DIGEST: DiskCare = DiskCare { keep: false, digest: true, at_once: false };

#[test]
fn an_unchanged_disk_is_taken_and_a_moved_one_too() {
    let scene = Scene::new();
    let records = scene.record(DiskCare::default());
    assert_eq!(text(&scene.open(&records).unwrap()), *b"old");
    fs::rename(scene.path("disk"), scene.path("elsewhere")).unwrap();
    assert!(scene.open(&records).unwrap_err().contains("cannot open"));
    scene.open_at(&records, &["elsewhere"], false).unwrap();
}

/// A machine that was restored from a snapshot with a kept read-only disk is saved in that snapshot's place, without its disks:
/// the kept disk was removed, and the new snapshot named it.
#[test]
fn a_kept_disk_that_is_in_use_is_not_removed_with_its_snapshot() {
    let scene = Scene::new();
    fs::write(scene.path("snap"), b"").unwrap();
    let generation = GenerationId::random().unwrap();
    let file = DiskFile::open(&scene.path("disk"), true).unwrap();
    let disk = Disk { id: "data".to_owned(), file, engine: EngineChoice::Auto };
    let (replaced, kept) = record(&[disk], KEEP, &scene.path("snap"), &generation).unwrap();
    kept.claim();

    let in_use = scene.open(&replaced).unwrap();
    let (by, _) = record(&[in_use], DiskCare::default(), &scene.path("snap"), &generation).unwrap();
    remove_kept(&replaced, &by, &scene.path("snap"));
    assert_eq!(text(&scene.open(&by).unwrap()), *b"old");
    remove_kept(&replaced, &[], &scene.path("snap"));
    assert!(scene.open(&by).is_err());
}

/// As soon after the record as can be: the same bytes, so that only the stamp can tell.
#[test]
fn a_write_is_noticed_however_soon_it_comes() {
    for _ in 0..50 {
        let scene = Scene::new();
        scene.write("disk", b"old");
        let records = scene.record(DiskCare::default());
        scene.write("disk", b"old");
        let refused = scene.open(&records).unwrap_err();
        assert!(refused.starts_with("disk `data`: ") && refused.contains("was written since"), "{refused}");
    }
}

#[test]
fn the_user_may_take_a_changed_disk() {
    let scene = Scene::new();
    let records = scene.record(DIGEST);
    scene.write("disk", b"new");
    assert!(scene.open(&records).unwrap_err().contains("--allow-changed-disks"));
    assert_eq!(text(&scene.open_at(&records, &[], true).unwrap()), *b"new");
}

#[test]
fn a_digest_knows_the_same_bytes_in_another_place() {
    let scene = Scene::new();
    let records = scene.record(DIGEST);
    fs::write(scene.path("copy"), fs::read(scene.path("disk")).unwrap()).unwrap();
    scene.open_at(&records, &["copy"], false).unwrap();
    scene.write("copy", b"new");
    assert!(scene.open_at(&records, &["copy"], false).is_err());
    let without = scene.record(DiskCare::default());
    fs::copy(scene.path("disk"), scene.path("other")).unwrap();
    assert!(scene.open_at(&without, &["other"], false).is_err());
}

#[test]
fn another_size_is_refused_whatever_the_user_says() {
    let scene = Scene::new();
    let records = scene.record(DiskCare::default());
    fs::File::options().write(true).open(scene.path("disk")).unwrap().set_len(SIZE * 2).unwrap();
    let refused = scene.open_at(&records, &[], true).unwrap_err();
    assert!(refused.contains("has 6291456 bytes, and had 3145728"), "{refused}");
}

#[test]
fn a_kept_disk_serves_again_and_again() {
    let scene = Scene::new();
    let records = scene.record(KEEP);
    let kept = records[0].kept.clone().unwrap();
    assert!(kept.file.starts_with("snap.data.") && kept.file.ends_with(".disk"), "{}", kept.file);
    scene.write("disk", b"new");
    for _ in 0..2 {
        let disk = scene.open(&records).unwrap();
        assert_eq!((text(&disk), disk.file.path.as_deref()), (*b"old", None));
        disk.file.file.write_all_at(b"mine", 1 << 20).unwrap();
    }
    let names = || fs::read_dir(scene.dir.path()).unwrap().count();
    assert_eq!(names(), 2, "the disk and the kept one");
}

#[test]
fn a_kept_disk_is_copied_to_a_place_that_is_free() {
    let scene = Scene::new();
    let records = scene.record(KEEP);
    scene.write("disk", b"new");
    let disk = scene.open_at(&records, &["mine"], false).unwrap();
    assert_eq!(text(&disk), *b"old");
    drop(disk);
    let disk = scene.open_at(&records, &["mine"], false).expect("a copy that nobody wrote");
    disk.file.file.write_all_at(b"own", 1 << 20).unwrap();
    drop(disk);
    let refused = scene.open_at(&records, &["mine"], false).unwrap_err();
    assert!(refused.contains("was written since"), "what is there is not overwritten: {refused}");
    assert_eq!(text(&scene.open(&records).unwrap()), *b"old");
}

#[test]
fn a_kept_disk_that_was_written_is_refused() {
    let scene = Scene::new();
    let records = scene.record(KEEP);
    let kept = scene.path(&records[0].kept.clone().unwrap().file);
    let file = fs::File::options().write(true).open(&kept);
    // Root may write what is read-only.
    if let Ok(file) = file {
        file.write_all_at(b"bad", 1 << 20).unwrap();
        assert!(scene.open(&records).unwrap_err().contains("was written since"));
    }
    fs::remove_file(kept).unwrap();
    assert!(scene.open(&records).unwrap_err().contains("cannot open"));
}

#[test]
fn a_copy_has_holes_and_the_digest_of_its_original() {
    use std::os::unix::fs::MetadataExt;
    let scene = Scene::new();
    let records = scene.record(DiskCare { keep: true, digest: true, at_once: false });
    let kept = DiskFile::open(&scene.path(&records[0].kept.clone().unwrap().file), true).unwrap();
    assert_eq!(Some(Digest::of(&kept).unwrap()), records[0].digest);
    assert!(kept.file.metadata().unwrap().blocks() * 512 <= 1 << 20);
    let empty = scene.path("empty");
    fs::File::create(&empty).unwrap().set_len(SIZE).unwrap();
    assert_ne!(Some(Digest::of(&DiskFile::open(&empty, true).unwrap()).unwrap()), records[0].digest);
}

#[test]
fn kept_disks_of_no_snapshot_are_removed() {
    let scene = Scene::new();
    let generation = GenerationId::random().unwrap();
    let made = record(&[scene.disk()], KEEP, &scene.path("snap"), &generation).unwrap();
    assert_eq!(fs::read_dir(scene.dir.path()).unwrap().count(), 2);
    drop(made);
    assert_eq!(fs::read_dir(scene.dir.path()).unwrap().count(), 1);
}

#[test]
fn a_disk_without_a_name_is_kept_or_not_saved() {
    let scene = Scene::new();
    let records = scene.record(KEEP);
    let disk = scene.open(&records).unwrap();
    let generation = GenerationId::random().unwrap();
    let save = |care| record(std::slice::from_ref(&disk), care, &scene.path("next"), &generation);
    let refused = save(DiskCare::default()).err().map(|error| crate::complaint::one_line(&error)).unwrap();
    assert!(refused.contains("use --with-disks"), "{refused}");
    let (records, _unclaimed) = save(KEEP).unwrap();
    assert_eq!(records[0].path, None);
}

#[test]
fn a_place_for_no_disk_is_refused() {
    let scene = Scene::new();
    let refused = scene.open_at(&[], &["disk"], false).unwrap_err();
    assert_eq!(refused, "--disk data=…: the machine has no disk of that id; it has none");
}

#[test]
fn records_that_lead_elsewhere_are_refused() {
    let scene = Scene::new();
    let good = scene.record(KEEP).remove(0);
    for file in ["../x", "/etc/passwd", "", "..", "a/b"] {
        let mut record = good.clone();
        record.kept = Some(KeptDisk { file: file.to_owned(), modified_ns: 0 });
        assert!(check(&[record]).is_err(), "{file}");
    }
    assert!(check(&[DiskRecord { id: "../x".to_owned(), ..good }]).is_err());
}
