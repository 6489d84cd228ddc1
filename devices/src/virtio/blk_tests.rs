//! The block device over a disk in memory that answers when it is told to.

use super::*;
use crate::BusDevice;
use crate::virtio::testing::{Driver, Line, RAM, ram};
use crate::virtio::{Chain, MmioHost, MmioState, Transport, hostile};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 64 * SECTOR;

/// What a disk is made of, kept when its engine ends.
#[derive(Default)]
struct Inside {
    bytes: Vec<u8>,
    /// Taken in and not begun.
    waiting: VecDeque<(u16, Operation)>,
    done: Vec<Completion>,
    /// How many may still be done: none of a disk that hangs.
    may_do: usize,
    flushes: usize,
    fails: bool,
}

#[derive(Clone)]
struct MemoryDisk {
    inside: Arc<Mutex<Inside>>,
    memory: Memory,
    event: Arc<OwnedFd>,
}

impl MemoryDisk {
    fn new(memory: &Memory) -> Self {
        let inside = Inside { bytes: vec![0; SIZE as usize], may_do: usize::MAX, ..Inside::default() };
        Self::of(Arc::new(Mutex::new(inside)), memory)
    }

    fn of(inside: Arc<Mutex<Inside>>, memory: &Memory) -> Self {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        Self { inside, memory: memory.clone(), event }
    }

    /// The same disk as another process opens it: what was under way has been cut off.
    fn reopened(&self, memory: &Memory) -> Self {
        let mut inside = self.inside.lock().unwrap();
        inside.waiting.clear();
        inside.done.clear();
        Self::of(self.inside.clone(), memory)
    }

    fn host(&self) -> BlkHost {
        BlkHost { engine: Box::new(self.clone()), memory: self.memory.clone() }
    }

    fn lets(&self, count: usize) {
        self.inside.lock().unwrap().may_do = count;
        self.clone().start();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        self.inside.lock().unwrap().bytes[at as usize..at as usize + len].to_vec()
    }
}

impl Inside {
    fn apply(&mut self, operation: &Operation, memory: &Memory) -> io::Result<()> {
        if self.fails {
            return Err(io::Error::other("as the test wants it"));
        }
        let range = operation.range().map(|(offset, len)| offset as usize..(offset + len) as usize);
        match (operation, range) {
            (Operation::Read { into, .. }, Some(range)) => {
                into.write(memory, 0, &self.bytes[range]).map_err(io::Error::other)?;
            }
            (Operation::Write { from, .. }, Some(range)) => {
                from.read(memory, 0, &mut self.bytes[range]).map_err(io::Error::other)?;
            }
            (_, Some(range)) => self.bytes[range].fill(0),
            (_, None) => self.flushes += 1,
        }
        Ok(())
    }
}

impl DiskEngine for MemoryDisk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, token: u16, operation: &Operation) {
        self.inside.lock().unwrap().waiting.push_back((token, operation.clone()));
    }

    fn start(&mut self) {
        let mut inside = self.inside.lock().unwrap();
        while inside.may_do > 0
            && let Some((token, operation)) = inside.waiting.pop_front()
        {
            inside.may_do = inside.may_do.saturating_sub(1);
            let result = inside.apply(&operation, &self.memory);
            inside.done.push(Completion { token, result });
            rustix::io::write(&*self.event, &1u64.to_le_bytes()).unwrap();
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn completed(&mut self) -> Vec<Completion> {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        std::mem::take(&mut self.inside.lock().unwrap().done)
    }
}

fn state() -> BlkState {
    BlkState { size: SIZE, serial: "serial-1".to_owned(), ..BlkState::default() }
}

fn driver_with(state: BlkState, refused: u64) -> (Driver<Blk>, MemoryDisk) {
    let memory = ram();
    let disk = MemoryDisk::new(&memory);
    let mut driver = Driver::untouched_in(memory, state, disk.host());
    driver.negotiate(refused);
    (driver, disk)
}

fn driver() -> (Driver<Blk>, MemoryDisk) {
    driver_with(state(), 0)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Lends a request, notifies, and lets the I/O thread look. Returns head, data and status places.
fn ask(driver: &mut Driver<Blk>, readable: &[&[u8]], writable: &[u32]) -> (u16, Vec<u64>) {
    let lent = driver.lend(0, readable, writable);
    driver.notify(0);
    driver.device.host_ready();
    lent
}

/// The status of a request that must have been answered, and the bytes used.
fn answered(driver: &mut Driver<Blk>, (head, at): &(u16, Vec<u64>)) -> (u8, u32) {
    let used = driver.used(0);
    assert_eq!(used.len(), 1, "one answer");
    assert_eq!(used[0].0, *head);
    (driver.bytes(*at.last().unwrap(), 1)[0], used[0].1)
}

fn done(driver: &mut Driver<Blk>, readable: &[&[u8]], writable: &[u32]) -> (u8, u32) {
    let lent = ask(driver, readable, writable);
    answered(driver, &lent)
}

#[test]
fn what_is_written_is_read_back() {
    let (mut driver, disk) = driver();
    let data: Vec<u8> = (0..1024).map(|n| (n % 251) as u8).collect();
    let wrote = done(&mut driver, &[&header(T_OUT, 3), &data[..100], &data[100..]], &[1]);
    assert_eq!(wrote, (0, 1));
    assert_eq!(disk.bytes(3 * SECTOR, 1024), data);
    let lent = ask(&mut driver, &[&header(T_IN, 3)], &[1000, 24, 1]);
    assert_eq!(answered(&mut driver, &lent), (0, 1025));
    assert_eq!(driver.bytes(lent.1[0], 1000), data[..1000]);
    assert_eq!(driver.bytes(lent.1[1], 24), data[1000..]);
}

#[test]
fn framing_is_the_drivers_choice() {
    let (mut driver, disk) = driver();
    let whole = [header(T_OUT, 0), vec![7; 512]].concat();
    assert_eq!(done(&mut driver, &[&whole[..5], &whole[5..20], &whole[20..]], &[1]).0, 0);
    assert_eq!(disk.bytes(0, 512), [7; 512]);
    let lent = ask(&mut driver, &[&header(T_IN, 0)], &[513]);
    assert_eq!(driver.used(0), [(lent.0, 513)]);
    assert_eq!(driver.bytes(lent.1[0], 513), [vec![7; 512], vec![0]].concat());
}

#[test]
fn the_configuration_tells_the_size() {
    let (mut driver, _disk) = driver();
    let mut config = [0; 60];
    driver.device.read(0x100, &mut config);
    assert_eq!(le64(&config), 64);
    assert_eq!([12, 20, 40, 52].map(|at| le32(&config[at..])), [254, 512, 1, 1]);
}

#[test]
fn a_serial_number_is_twenty_bytes() {
    let (mut driver, _disk) = driver();
    let lent = ask(&mut driver, &[&header(T_GET_ID, 0)], &[20, 1]);
    assert_eq!(answered(&mut driver, &lent), (0, 21));
    assert_eq!(driver.bytes(lent.1[0], 20), *b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn what_lies_outside_the_disk_is_an_error() {
    let (mut driver, disk) = driver();
    let sector = [0xaa; 512];
    for (kind, at, len) in [
        (T_OUT, 64, 512),
        (T_OUT, u64::MAX, 512),
        (T_OUT, u64::MAX / 512, 512),
        (T_OUT, 0, 511),
        (T_OUT, 63, 1024),
    ] {
        let data = sector.repeat(2);
        assert_eq!(done(&mut driver, &[&header(kind, at), &data[..len]], &[1]), (1, 1), "{kind} at {at}");
    }
    assert_eq!(done(&mut driver, &[&header(T_IN, 64)], &[512, 1]), (1, 1));
    assert_eq!(done(&mut driver, &[&header(T_IN, 0)], &[13, 1]), (1, 1));
    assert_eq!(disk.bytes(0, SIZE as usize), vec![0; SIZE as usize]);
}

#[test]
fn an_unknown_request_is_unsupported() {
    let (mut driver, _disk) = driver();
    for kind in [2, 10, 14, u32::MAX] {
        assert_eq!(done(&mut driver, &[&header(kind, 0)], &[512, 1]), (2, 1));
    }
}

#[test]
fn a_request_without_header_or_status_needs_a_reset() {
    for (readable, writable) in [(&[0u8; 15][..], &[1u32][..]), (&[0; 16], &[])] {
        let (mut driver, _disk) = driver();
        driver.lend(0, &[readable], writable);
        driver.notify(0);
        assert!(driver.needs_reset());
    }
}

#[test]
fn zeroes_are_one_range_with_known_flags() {
    let (mut driver, disk) = driver();
    disk.inside.lock().unwrap().bytes.fill(9);
    let zero = |range: Vec<u8>| [header(T_WRITE_ZEROES, 0), range].concat();
    assert_eq!(done(&mut driver, &[&zero(range(1, 2, UNMAP))], &[1]), (0, 1));
    assert_eq!(disk.bytes(0, 2048), [vec![9; 512], vec![0; 1024], vec![9; 512]].concat());
    assert_eq!(done(&mut driver, &[&zero(range(1, 2, 2))], &[1]).0, 2);
    assert_eq!(done(&mut driver, &[&zero(range(63, 2, 0))], &[1]).0, 1);
    assert_eq!(done(&mut driver, &[&zero(range(0, u32::MAX, 0))], &[1]).0, 1);
    assert_eq!(done(&mut driver, &[&zero([range(0, 1, 0), range(1, 1, 0)].concat())], &[1]).0, 1);
    let discard = |flags| [header(T_DISCARD, 0), range(4, 1, flags)].concat();
    assert_eq!(done(&mut driver, &[&discard(0)], &[1]).0, 0);
    assert_eq!(done(&mut driver, &[&discard(UNMAP)], &[1]).0, 2, "unmap is not for discards");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let (mut driver, disk) = driver_with(BlkState { read_only: true, ..state() }, 0);
    assert_eq!(driver.device.device().features() & (RO | FLUSH), RO);
    assert_eq!(done(&mut driver, &[&header(T_OUT, 0), &[1; 512]], &[1]), (1, 1));
    assert_eq!(done(&mut driver, &[&header(T_FLUSH, 0)], &[1]), (0, 1));
    assert_eq!(disk.bytes(0, 512), [0; 512]);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let (mut driver, disk) = driver_with(state(), FLUSH);
    let lent = driver.lend(0, &[&header(T_OUT, 0), &[1; 512]], &[1]);
    driver.notify(0);
    driver.device.host_ready();
    driver.device.host_ready();
    assert_eq!(answered(&mut driver, &lent), (0, 1));
    assert_eq!(disk.inside.lock().unwrap().flushes, 1);
}

#[test]
fn a_disk_that_fails_is_told_to_the_driver() {
    let (mut driver, disk) = driver();
    disk.inside.lock().unwrap().fails = true;
    assert_eq!(done(&mut driver, &[&header(T_IN, 0)], &[512, 1]), (1, 1));
    assert_eq!(done(&mut driver, &[&header(T_FLUSH, 0)], &[1]), (1, 1));
}

#[test]
fn a_drain_waits_for_the_disk_and_no_longer_than_it_may() {
    let (mut driver, disk) = driver();
    disk.lets(0);
    let lent = driver.lend(0, &[&header(T_OUT, 0), &[5; 512]], &[1]);
    driver.notify(0);
    driver.device.drain(Instant::now() + Duration::from_millis(1));
    assert!(driver.used(0).is_empty());
    assert_eq!(driver.device.save().device.unfinished.len(), 1);
    disk.lets(1);
    driver.device.drain(Instant::now() + Duration::from_secs(3600));
    assert_eq!(answered(&mut driver, &lent), (0, 1));
    assert!(driver.device.save().device.unfinished.is_empty());
}

#[test]
fn a_drain_without_time_takes_what_is_done() {
    let (mut driver, disk) = driver();
    let lent = driver.lend(0, &[&header(T_FLUSH, 0)], &[1]);
    disk.lets(0);
    driver.notify(0);
    disk.lets(1);
    driver.device.drain(Instant::now());
    assert_eq!(answered(&mut driver, &lent), (0, 1));
}

/// A write, a read and a flush are cut off, one of them done already and not answered.
#[test]
fn what_is_unfinished_is_begun_anew_by_a_restore() {
    let (mut driver, disk) = driver();
    disk.lets(1);
    let write = driver.lend(0, &[&header(T_OUT, 2), &[6; 512]], &[1]);
    let read = driver.lend(0, &[&header(T_IN, 2)], &[512, 1]);
    let flush = driver.lend(0, &[&header(T_FLUSH, 0)], &[1]);
    driver.notify(0);
    let saved = driver.device.save();
    assert_eq!(saved.device.unfinished.len(), 3);

    let encoded = postcard::to_stdvec(&saved).unwrap();
    assert_eq!(postcard::from_bytes::<MmioState<BlkState>>(&encoded).unwrap(), saved);

    let again = disk.reopened(&driver.memory);
    again.lets(usize::MAX);
    let mut driver = driver.restored(again.host());
    driver.device.host_ready();
    let used = driver.used(0);
    assert_eq!(used, [(write.0, 1), (read.0, 513), (flush.0, 1)]);
    assert_eq!(driver.bytes(read.1[0], 513), [vec![6; 512], vec![0]].concat());
    assert_eq!(again.bytes(2 * SECTOR, 512), [6; 512]);
}

#[test]
fn a_restored_device_that_never_ran_is_saved_as_it_was() {
    let (mut driver, disk) = driver();
    disk.lets(0);
    driver.lend(0, &[&header(T_FLUSH, 0)], &[1]);
    driver.lend(0, &[&header(T_IN, 0)], &[512, 1]);
    driver.notify(0);
    let saved = driver.device.save();
    let ends = MmioHost {
        memory: driver.memory.clone(),
        irq: Box::new(driver.irq.clone()),
        device: disk.reopened(&driver.memory).host(),
    };
    let mut restored = crate::virtio::Mmio::<Blk>::from_state(&saved, ends).unwrap();
    restored.drain(Instant::now() + Duration::from_secs(3600));
    assert_eq!(restored.save(), saved);
}

#[test]
fn a_reset_leaves_nothing_that_could_touch_guest_memory() {
    let (mut driver, disk) = driver();
    disk.lets(0);
    let lent = driver.lend(0, &[&header(T_IN, 0)], &[512, 1]);
    driver.memory.write_slice(&[3; 512], GuestAddress(lent.1[0])).unwrap();
    driver.notify(0);
    let slow = disk.clone();
    let answers = std::thread::spawn(move || slow.lets(1));
    driver.write(0x70, 0);
    answers.join().unwrap();
    assert_eq!(driver.device.save().device, state());
    assert_eq!(driver.bytes(lent.1[0], 512), [0; 512], "it was waited for");
    assert!(driver.used(0).is_empty());
}

/// Found by the hostile guest: what had been taken in was never begun, and the reset waited for it for ever.
#[test]
fn a_rule_broken_after_a_good_request_needs_a_reset_and_nothing_else() {
    let (mut driver, disk) = driver();
    driver.lend(0, &[&header(T_OUT, 0), &[7; 512]], &[1]);
    driver.lend_raw(0, &[(u64::MAX, 2, 2)]);
    driver.notify(0);
    assert!(driver.needs_reset());
    assert_eq!(disk.bytes(0, 512), [7; 512], "it is done before the reset is");
}

/// Found by reading: the answers behind the one that could not be given were forgotten, and waited for for ever.
#[test]
fn an_answer_that_cannot_be_given_keeps_no_other_from_its_end() {
    let memory = ram();
    let flush = |head| Request { head, status: 0x2_0000, written: 1, operation: Operation::Flush };
    let (driver, _) = driver();
    let mut saved = driver.device.save();
    saved.device.unfinished = vec![flush(200), flush(1), flush(2)];
    saved.registers.as_mut().unwrap().queues[0].size = 128;
    let disk = MemoryDisk::new(&memory);
    let ends = MmioHost { memory, irq: Box::new(Line::default()), device: disk.host() };
    let mut restored = crate::virtio::Mmio::<Blk>::from_state(&saved, ends).unwrap();
    restored.start();
    assert!(restored.broken().is_some());
}

#[test]
fn a_head_that_is_offered_too_often_needs_a_reset() {
    let (mut driver, disk) = driver();
    disk.lets(0);
    let head = driver.lend(0, &[&header(T_FLUSH, 0)], &[1]).0;
    for _ in 0..QUEUE {
        driver.notify(0);
        driver.offer(0, head);
    }
    let slow = disk.clone();
    let answers = std::thread::spawn(move || slow.lets(usize::MAX));
    driver.notify(0);
    assert!(driver.needs_reset());
    answers.join().unwrap();
}

#[test]
fn a_state_that_no_device_can_have_is_refused() {
    let memory = ram();
    let request = |operation| Request { head: 1, status: 0x1000, written: 1, operation };
    let refused = |state: BlkState| Blk::from_state(&state, MemoryDisk::new(&memory).host()).is_err();
    let with = |request: Request| BlkState { unfinished: vec![request], ..state() };
    let chain = Chain::default();
    assert!(!refused(with(request(Operation::Flush))));
    assert!(!refused(with(request(Operation::Read { offset: 0, into: chain.writable }))));
    assert!(refused(BlkState { size: SIZE + SECTOR, ..state() }));
    assert!(refused(BlkState { serial: "x".repeat(21), ..state() }));
    assert!(refused(with(request(Operation::Discard { offset: SIZE, len: 512 }))));
    assert!(refused(with(request(Operation::Discard { offset: 1, len: 512 }))));
    assert!(refused(with(request(Operation::Discard { offset: u64::MAX - 511, len: 512 }))));
    assert!(refused(with(Request { status: RAM as u64, ..request(Operation::Flush) })));
    assert!(refused(with(Request { head: 256, ..request(Operation::Flush) })));
    let outside: Segments =
        postcard::from_bytes(&postcard::to_stdvec(&[(RAM as u64 - 1, 512u32)].to_vec()).unwrap()).unwrap();
    assert!(refused(with(request(Operation::Write { offset: 0, from: outside }))));
    assert!(refused(BlkState { unfinished: vec![request(Operation::Flush); 257], ..state() }));
    let write = request(Operation::Write { offset: 0, from: Segments::default() });
    assert!(refused(BlkState { read_only: true, ..with(write) }));
}

/// A descriptor of a hostile driver: mostly near what is right.
fn piece() -> impl Strategy<Value = (u64, u32, u16)> {
    let address = prop_oneof![8 => 0x2_0000u64..0x3_0000, 1 => any::<u64>(), 1 => 0u64..0x4000];
    let len = prop_oneof![Just(16u32), Just(1), Just(512), 0u32..2000, any::<u32>()];
    (address, len, prop_oneof![Just(0u16), Just(2), any::<u16>()])
}

proptest! {
    /// No request panics, hangs or reaches beyond the disk; the device is saved and restored in the middle.
    #[test]
    fn hostile_requests(
        requests in prop::collection::vec(
            (0u32..16, prop_oneof![0u64..80, any::<u64>()], prop::collection::vec(piece(), 1..5), any::<bool>()),
            0..30,
        ),
        accesses in prop::collection::vec((0u64..0x140, any::<u32>()), 0..20),
        read_only: bool,
        at_once in 0usize..4,
    ) {
        let (mut driver, disk) = driver_with(BlkState { read_only, ..state() }, 0);
        for (kind, sector, pieces, restore) in requests {
            disk.lets(at_once);
            let place = driver.place(&header(kind, sector));
            let mut chain = vec![(place, 16, 0)];
            chain.extend(&pieces);
            chain.push((0x2_0000, 1, 2));
            driver.lend_raw(0, &chain);
            disk.lets(usize::MAX);
            driver.notify(0);
            if restore {
                let again = disk.reopened(&driver.memory);
                driver = driver.restored(again.host());
            }
            driver.device.host_ready();
            driver.device.drain(Instant::now());
        }
        disk.lets(usize::MAX);
        for (offset, value) in accesses {
            driver.write(offset & !3, value);
            driver.read(offset & !3);
        }
        if read_only {
            prop_assert!(disk.bytes(0, SIZE as usize).iter().all(|&byte| byte == 0));
        }
    }

    /// Whatever a guest does and a snapshot holds: nothing panics or hangs, and what is saved is taken back.
    #[test]
    fn any_guest_and_any_snapshot(acts in hostile::acts()) {
        let mut disk: Option<MemoryDisk> = None;
        let open = |memory: &_| {
            let opened = disk.as_ref().map_or_else(|| MemoryDisk::new(memory), |disk| disk.reopened(memory));
            disk.insert(opened).host()
        };
        hostile::attack::<Blk>(state(), open, acts);
    }
}
