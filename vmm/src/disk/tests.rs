//! Both engines over real files.

use super::*;
use devices::virtio::{Operation, Segments};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const SIZE: u64 = 1 << 20;

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn disk(dir: &Path) -> DiskFile {
    let path = dir.join("disk");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    DiskFile::open(&path, false).unwrap()
}

fn segments(pieces: &[(u64, u32)]) -> Segments {
    let json = pieces.iter().map(|(address, len)| serde_json::json!({ "address": address, "len": len }));
    serde_json::from_value(json.collect::<Vec<_>>().into()).unwrap()
}

/// Submits all and waits until all are done; the results by token.
fn run(engine: &mut dyn DiskEngine, operations: &[Operation]) -> Vec<io::Result<()>> {
    let mut results: Vec<_> = operations.iter().map(|_| None).collect();
    for (token, operation) in (0..).zip(operations) {
        engine.submit(token, operation);
    }
    engine.start();
    while results.iter().any(Option::is_none) {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(engine.event(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        for done in engine.completed() {
            assert!(results[usize::from(done.token)].replace(done.result).is_none());
        }
    }
    results.into_iter().flatten().collect()
}

/// Whether the kernel has no io_uring for this process.
fn no_uring() -> bool {
    let error = io_uring::IoUring::new(1).err().and_then(|error| error.raw_os_error());
    matches!(error, Some(libc::ENOSYS | libc::EPERM))
}

/// With each engine that this host has, and a fresh disk. A host without io_uring says so.
fn with_engines(test: impl Fn(&mut dyn DiskEngine, &DiskFile, &Memory)) {
    for choice in [EngineChoice::Uring, EngineChoice::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let (disk, memory) = (disk(dir.path()), memory());
        match engine(&disk, &memory, choice) {
            Ok(mut engine) => test(&mut *engine, &disk, &memory),
            Err(error) if choice == EngineChoice::Uring && no_uring() => {
                println!("skipped on {choice:?}, which this host has not: {error}");
            }
            Err(error) => panic!("{choice:?}: {error}"),
        }
    }
}

#[test]
fn bytes_go_between_the_disk_and_guest_ram() {
    with_engines(|engine, disk, memory| {
        memory.write_slice(b"abcdefgh", GuestAddress(0x1000)).unwrap();
        let from = segments(&[(0x1004, 4), (0x1000, 4), (0x2000, 504)]);
        run(engine, &[Operation::Write { offset: 512, from }]).remove(0).unwrap();
        let mut bytes = [0; 8];
        disk.file.read_exact_at(&mut bytes, 512).unwrap();
        assert_eq!(&bytes, b"efghabcd");
        let into = segments(&[(0x3000, 8), (0x4000, 504)]);
        run(engine, &[Operation::Read { offset: 512, into }, Operation::Flush])
            .into_iter()
            .collect::<io::Result<()>>()
            .unwrap();
        memory.read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!(&bytes, b"efghabcd");
    });
}

/// A read that fails half way has written, too.
#[test]
fn what_is_read_is_marked_as_written() {
    with_engines(|engine, disk, memory| {
        disk.file.set_len(8192).unwrap();
        let marks = memory.iter().next().map(devices::marks).unwrap();
        marks.start();
        let read = |offset, pieces: &[(u64, u32)]| Operation::Read { offset, into: segments(pieces) };
        run(engine, &[read(0, &[(0x3ffc, 8), (0x9000, 504)])]).remove(0).unwrap();
        assert_eq!(marks.take()[0], 1 << 3 | 1 << 4 | 1 << 9);
        run(engine, &[read(4096, &[(0x5000, 8192)])]).remove(0).unwrap_err();
        assert_eq!(marks.take()[0] & 1 << 5, 1 << 5);
        run(engine, &[Operation::Write { offset: 0, from: segments(&[(0x3000, 512)]) }]).remove(0).unwrap();
        assert_eq!(marks.take()[0], 0);
    });
}

#[test]
fn many_are_under_way_at_once() {
    with_engines(|engine, disk, memory| {
        for n in 0..256u64 {
            memory.write_obj(n, GuestAddress(n * 512)).unwrap();
        }
        let write = |n: u64| Operation::Write { offset: n * 512, from: segments(&[(n * 512, 512)]) };
        for result in run(engine, &(0..256).map(write).collect::<Vec<_>>()) {
            result.unwrap();
        }
        for n in 0..256 {
            let mut bytes = [0; 8];
            disk.file.read_exact_at(&mut bytes, n * 512).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), n);
        }
    });
}

#[test]
fn more_pieces_than_one_call_takes() {
    with_engines(|engine, disk, memory| {
        memory.write_slice(&vec![5; 0x8000], GuestAddress(0)).unwrap();
        let from = segments(&(0..2048).map(|n| (n * 16, 16)).collect::<Vec<_>>());
        run(engine, &[Operation::Write { offset: 0, from }]).remove(0).unwrap();
        let mut bytes = vec![0; 0x8000];
        disk.file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 5));
    });
}

#[test]
fn zeroes_and_discards() {
    with_engines(|engine, disk, _| {
        disk.file.write_all_at(&vec![9; SIZE as usize], 0).unwrap();
        let operations = [
            Operation::WriteZeroes { offset: 512, len: 1024, unmap: false },
            Operation::WriteZeroes { offset: 8192, len: 4096, unmap: true },
            Operation::WriteZeroes { offset: 0, len: 0, unmap: false },
            Operation::Discard { offset: 65536, len: 65536 },
        ];
        run(engine, &operations).into_iter().collect::<io::Result<()>>().unwrap();
        let mut bytes = vec![0; 16384];
        disk.file.read_exact_at(&mut bytes, 0).unwrap();
        let zero = |at: usize| (512..1536).contains(&at) || (8192..12288).contains(&at);
        for (at, &byte) in bytes.iter().enumerate() {
            assert_eq!(byte == 0, zero(at), "byte {at}");
        }
        assert_eq!(disk.file.metadata().unwrap().len(), SIZE);
    });
}

#[test]
fn what_cannot_be_done_is_an_error_and_no_signal() {
    with_engines(|engine, disk, memory| {
        disk.file.set_len(4096).unwrap();
        let read = |offset| Operation::Read { offset, into: segments(&[(0, 1024)]) };
        let outside = Operation::Read { offset: 0, into: segments(&[(0xf_ff00, 512)]) };
        let results = run(engine, &[read(0), read(3584), read(8192), outside, Operation::Flush]);
        let failed: Vec<_> = results.iter().map(Result::is_err).collect();
        assert_eq!(failed, [false, true, true, true, false]);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    });
}

/// The kernel answers EFAULT where a load of ours would have been a SIGBUS.
#[test]
fn guest_ram_that_lost_its_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path());
    let backing = tempfile::tempfile().unwrap();
    backing.set_len(1 << 20).unwrap();
    let range = crate::ram::FileRange { gpa: 0, len: 1 << 20, offset: 0 };
    let ram = crate::ram::GuestRam::from_snapshot(backing.try_clone().unwrap(), &[range]).unwrap();
    backing.set_len(0).unwrap();
    for choice in [EngineChoice::Auto, EngineChoice::Threads] {
        let mut engine = engine(&disk, ram.memory(), choice).unwrap();
        let write = Operation::Write { offset: 0, from: segments(&[(0, 512)]) };
        assert!(run(&mut *engine, &[write]).remove(0).is_err());
    }
}

#[test]
fn an_engine_that_ends_has_let_go_of_guest_ram() {
    with_engines(|engine, _, _| {
        for token in 0..200 {
            engine.submit(token, &Operation::Read { offset: 0, into: segments(&[(0, 65536)]) });
        }
        engine.start();
    });
}

#[test]
fn a_disk_that_is_written_has_one_user() {
    let dir = tempfile::tempdir().unwrap();
    let first = disk(dir.path());
    let path = dir.path().join("disk");
    for read_only in [false, true] {
        let refused = DiskFile::open(&path, read_only).unwrap_err().to_string();
        assert!(refused.contains("is in use"), "{refused}");
    }
    drop(first);
    let _reader = DiskFile::open(&path, true).unwrap();
    assert!(DiskFile::open(&path, true).is_ok());
    assert!(DiskFile::open(&path, false).is_err());
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        DiskFile::open(&path, false).unwrap_err().to_string()
    };
    assert!(refused("empty", b"").contains("0 bytes: expected a multiple of 512"));
    assert!(refused("odd", &[0; 513]).contains("513 bytes"));
    let mut image = vec![0; 1024];
    image[..4].copy_from_slice(&[0x51, 0x46, 0x49, 0xfb]);
    assert!(refused("image", &image).contains("qemu-img convert -O raw"));
    assert!(DiskFile::open(dir.path(), false).unwrap_err().to_string().contains("neither"));
    assert!(DiskFile::open(&dir.path().join("none"), false).is_err());
}
