//! A disk on trial, by way of its engine, over real files.

use super::super::{DiskFile, EngineChoice, engine};
use super::*;
use devices::Memory;
use devices::virtio::{DiskEngine, Segments};
use proptest::prelude::*;
use std::path::PathBuf;
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 1 << 20;

struct Scene {
    _dir: tempfile::TempDir,
    path: PathBuf,
    disk: DiskFile,
    memory: Memory,
    engine: Box<dyn DiskEngine>,
}

impl Scene {
    /// A disk that is all ones.
    fn new(choice: EngineChoice) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let mut disk = DiskFile::open(&path, false).unwrap();
        disk.trial = Some(Arc::new(Trial::of(&disk).unwrap()));
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let engine = engine(&disk, &memory, choice).unwrap();
        Self { _dir: dir, path, disk, memory, engine }
    }

    fn trial(&self) -> Arc<Trial> {
        self.disk.trial.clone().unwrap()
    }

    fn ask(&mut self, operation: Operation) -> io::Result<()> {
        self.engine.submit(7, &operation);
        self.engine.start();
        loop {
            let event = self.engine.event();
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(event, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            if let Some(done) = self.engine.completed().pop() {
                return done.result;
            }
        }
    }

    /// From guest RAM, in two pieces that part within a sector.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(0x100)).unwrap();
        let from = segments(&[(0x100, 100), (0x164, bytes.len() as u32 - 100)]);
        self.ask(Operation::Write { offset, from }).unwrap();
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let into = segments(&[(0x1000, 300), (0x112c, len as u32 - 300)]);
        self.ask(Operation::Read { offset, into }).unwrap();
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        bytes
    }

    fn on_disk(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

fn segments(pieces: &[(u64, u32)]) -> Segments {
    let json = pieces.iter().map(|(address, len)| serde_json::json!({ "address": address, "len": len }));
    serde_json::from_value(json.collect::<Vec<_>>().into()).unwrap()
}

fn accept(trial: &Trial) -> u64 {
    let held = trial.hold();
    held.reserve().unwrap();
    let bytes = held.apply().unwrap();
    held.finish();
    bytes
}

#[test]
fn what_is_written_is_read_and_the_disk_does_not_have_it() {
    let mut scene = Scene::new(EngineChoice::Threads);
    scene.write(1024, &[2; 1024]);
    let read = scene.read(512, 2048);
    assert_eq!(read, [vec![1; 512], vec![2; 1024], vec![1; 512]].concat());
    scene.ask(Operation::Flush).unwrap();
    assert!(scene.on_disk().iter().all(|&byte| byte == 1));
}

#[test]
fn zeroes_are_written_too_and_what_is_discarded_stays() {
    let mut scene = Scene::new(EngineChoice::Threads);
    for unmap in [false, true] {
        scene.write(4096, &[2; 1024]);
        scene.ask(Operation::WriteZeroes { offset: 4608, len: 1024, unmap }).unwrap();
        assert_eq!(scene.read(4096, 2048), [vec![2; 512], vec![0; 1024], vec![1; 512]].concat());
    }
    scene.ask(Operation::Discard { offset: 0, len: 8192 }).unwrap();
    assert_eq!(scene.read(0, 1024), [1; 1024]);
    assert!(scene.on_disk().iter().all(|&byte| byte == 1));
    assert_eq!(accept(&scene.trial()), 512 + 1024);
    assert_eq!(scene.on_disk()[4096..6144], [vec![2; 512], vec![0; 1024], vec![1; 512]].concat());
}

#[test]
fn a_trial_that_is_accepted_is_the_disk_from_then_on() {
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        let mut scene = Scene::new(choice);
        scene.write(SIZE - 1024, &[2; 1024]);
        scene.ask(Operation::WriteZeroes { offset: 0, len: 1 << 19, unmap: true }).unwrap();
        assert_eq!(accept(&scene.trial()), 1024 + (1 << 19));
        let half = 1 << 19;
        let expected = [vec![0; half], vec![1; half - 1024], vec![2; 1024]].concat();
        assert!(scene.on_disk() == expected);
        scene.write(0, &[3; 512]);
        assert_eq!(scene.read(0, 1024), [vec![3; 512], vec![0; 512]].concat());
        scene.ask(Operation::Flush).unwrap();
        assert_eq!(scene.on_disk()[..512], [3; 512]);
    }
}

#[test]
fn a_job_that_comes_while_a_trial_is_accepted_waits_and_then_goes_to_the_disk() {
    let mut scene = Scene::new(EngineChoice::Threads);
    let trial = scene.trial();
    scene.write(0, &[2; 512]);
    let held = trial.hold();
    scene.memory.write_slice(&[3; 512], GuestAddress(0)).unwrap();
    let write = Operation::Write { offset: 0, from: segments(&[(0, 512)]) };
    // Already with the threads, since `submit` would ask whether the trial is over.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (trial, memory) = (&trial, &scene.memory);
        scope.spawn(move || {
            let mut job = Job::new(1, &write, memory).unwrap();
            sender.send(trial.run(&mut job).is_ok()).unwrap();
        });
        held.apply().unwrap();
        assert!(receiver.try_recv().is_err());
        held.finish();
        assert!(receiver.recv().unwrap());
    });
    assert_eq!(scene.on_disk()[..512], [3; 512]);
}

#[test]
fn without_room_the_disk_stays_as_it_was() {
    let scene = Scene::new(EngineChoice::Threads);
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let disk = DiskFile { file: Arc::new(full), path: None, ..scene.disk.clone() };
    let trial = Trial::of(&disk).unwrap();
    trial.beside.write_all_at(&[2; 512], 0).unwrap();
    trial.mark(0, 512);
    assert_eq!(trial.hold().apply().unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(!trial.is_over());
}

#[test]
fn sizes_of_any_kind_are_had_without_memory() {
    let (dir, size) = (tempfile::tempdir().unwrap(), 1 << 40);
    let path = dir.path().join("disk");
    File::create_new(&path).unwrap().set_len(size).unwrap();
    let disk = DiskFile::open(&path, false).unwrap();
    let trial = Trial::of(&disk).unwrap();
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let run = |operation: Operation| trial.run(&mut Job::new(0, &operation, &memory).unwrap());
    run(Operation::WriteZeroes { offset: 0, len: size, unmap: true }).unwrap();
    run(Operation::Write { offset: size - 512, from: segments(&[(0, 512)]) }).unwrap();
    let held = trial.hold();
    held.reserve().unwrap();
    assert_eq!(held.apply().unwrap(), size);
}

#[test]
fn what_stands_in_for_a_disk_reads_as_zeroes_and_takes_nothing() {
    let disk = DiskFile::stand_in(1 << 40).unwrap();
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        let engine = engine(&disk, &memory, choice).unwrap();
        memory.write_slice(&[1; 512], GuestAddress(0)).unwrap();
        let mut scene = Scene { engine, memory: memory.clone(), ..Scene::new(choice) };
        assert_eq!(scene.read((1 << 40) - 1024, 1024), [0; 1024]);
        let from = || segments(&[(0, 512)]);
        for operation in [
            Operation::Write { offset: 0, from: from() },
            Operation::WriteZeroes { offset: 0, len: 512, unmap: true },
            Operation::Discard { offset: 0, len: 512 },
        ] {
            assert!(scene.ask(operation.clone()).is_err(), "{operation:?}");
        }
        scene.ask(Operation::Flush).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Read(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..2048u64, 1..64u64).prop_map(|(first, count)| (first, count.min(2048 - first)));
    prop_oneof![
        (range(), 2u8..).prop_map(|((first, count), byte)| Step::Write(first, count, byte)),
        (range(), any::<bool>()).prop_map(|((first, count), unmap)| Step::Zero(first, count, unmap)),
        range().prop_map(|(first, count)| Step::Read(first, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Held against a plain run of bytes.
    #[test]
    fn whatever_is_done_is_seen_and_then_accepted(steps in proptest::collection::vec(step(), 1..40)) {
        let mut scene = Scene::new(EngineChoice::Threads);
        let mut model = vec![1; SIZE as usize];
        for step in steps {
            match step {
                Step::Write(first, count, byte) => {
                    let bytes = vec![byte; (count * SECTOR) as usize];
                    scene.write(first * SECTOR, &bytes);
                    model[(first * SECTOR) as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                Step::Zero(first, count, unmap) => {
                    let (offset, len) = (first * SECTOR, count * SECTOR);
                    scene.ask(Operation::WriteZeroes { offset, len, unmap }).unwrap();
                    model[offset as usize..][..len as usize].fill(0);
                }
                Step::Read(first, count) => {
                    let (offset, len) = ((first * SECTOR) as usize, (count * SECTOR) as usize);
                    prop_assert!(scene.read(offset as u64, len) == model[offset..][..len]);
                }
            }
            prop_assert!(scene.on_disk().iter().all(|&byte| byte == 1));
        }
        accept(&scene.trial());
        prop_assert!(scene.on_disk() == model);
    }
}
