//! The network device with a driver on one side and a wire in the test's hands on the other.

use super::features::{GUEST_CSUM, MRG_RXBUF};
use super::*;
use crate::virtio::hostile;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the test sees and sets of the wire.
#[derive(Default)]
struct Cable {
    arriving: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    /// Frames that there is room for; none: any number.
    room: Option<usize>,
    /// The host refuses every frame.
    refuses: bool,
    again: usize,
    offloads: Offloads,
}

#[derive(Clone)]
struct TestWire {
    cable: Arc<Mutex<Cable>>,
    fd: Arc<UnixDatagram>,
}

impl TestWire {
    fn new() -> Self {
        Self { cable: Arc::default(), fd: Arc::new(UnixDatagram::unbound().unwrap()) }
    }

    fn cable(&self) -> MutexGuard<'_, Cable> {
        self.cable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn again(&self) -> usize {
        std::mem::take(&mut self.cable().again)
    }
}

impl Wire for TestWire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn seen(&mut self) {}

    fn again(&mut self) {
        self.cable().again += 1;
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        let arrived = self.cable().arriving.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let len = arrived.len().min(frame.len());
        frame[..len].copy_from_slice(&arrived[..len]);
        Ok(len)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let mut cable = self.cable();
        if cable.refuses {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match &mut cable.room {
            Some(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Some(room) => *room -= 1,
            None => {}
        }
        cable.sent.push(frame.to_vec());
        Ok(())
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.cable().offloads = offloads;
        Ok(())
    }
}

fn state() -> NetState {
    NetState { mac: Mac([2, 0, 0, 0, 0, 7]), ..NetState::default() }
}

fn driver_without(refused: u64) -> (Driver<Net>, TestWire) {
    let wire = TestWire::new();
    let driver = Driver::<Net>::new(state(), Box::new(wire.clone()), refused);
    wire.again();
    (driver, wire)
}

fn driver() -> (Driver<Net>, TestWire) {
    driver_without(0)
}

/// A frame of `len` bytes that all are `fill`, behind a header that asks for nothing.
fn frame(fill: u8, len: usize) -> Vec<u8> {
    [vec![0; HEADER], vec![fill; len]].concat()
}

fn config(driver: &mut Driver<Net>) -> [u8; 12] {
    use crate::BusDevice;
    let mut config = [0; 12];
    driver.device.read(0x100, &mut config);
    config
}

#[test]
fn the_configuration_has_address_status_and_mtu() {
    let (mut plain, wire) = driver();
    assert_eq!(config(&mut plain), [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0, 0]);
    let with_mtu = NetState { mtu: Some(9000), ..state() };
    let mut driver = Driver::<Net>::new(with_mtu, Box::new(wire), 0);
    assert_eq!(config(&mut driver)[10..], 9000u16.to_le_bytes());
}

#[test]
fn a_frame_is_sent_and_its_buffer_comes_back() {
    let (mut driver, wire) = driver();
    let (head, _) = driver.lend(TRANSMIT, &[&frame(5, 3), &[6; 60]], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT), [(head, 0)]);
    assert_eq!(wire.cable().sent, [[frame(5, 3), vec![6; 60]].concat()]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_frame_for_which_there_is_no_room_waits_in_its_queue() {
    let (mut driver, wire) = driver();
    wire.cable().room = Some(1);
    for fill in [1, 2] {
        driver.lend(TRANSMIT, &[&frame(fill, 60)], &[]);
    }
    driver.notify(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    wire.cable().room = None;
    driver.device.work(Device::host_ready);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    assert_eq!(wire.cable().sent, [frame(1, 60), frame(2, 60)]);
}

#[test]
fn what_was_not_sent_before_a_capture_is_sent_after_a_restore_and_only_that() {
    let (mut driver, wire) = driver();
    wire.cable().room = Some(1);
    for fill in [1, 2] {
        driver.lend(TRANSMIT, &[&frame(fill, 60)], &[]);
    }
    driver.notify(TRANSMIT);
    let elsewhere = TestWire::new();
    let mut driver = driver.restored(Box::new(elsewhere.clone()));
    assert_eq!(wire.cable().sent, [frame(1, 60)]);
    assert_eq!(elsewhere.cable().sent, [frame(2, 60)]);
    assert_eq!(driver.used(TRANSMIT).len(), 2);
}

#[test]
fn what_asks_for_more_than_was_negotiated_is_dropped() {
    const TSO4: u64 = 1 << 11;
    let asks = |flags: u8, gso: u8| [&[flags, gso][..], &[0; 10], &[1; 60]].concat();
    let sent = |refused: u64, frame: &[u8]| {
        let (mut driver, wire) = driver_without(refused);
        driver.lend(TRANSMIT, &[frame], &[]);
        driver.notify(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT).len(), 1, "the buffer comes back either way");
        let (sent, counted) = (wire.cable().sent.len() as u64, driver.device.device().counters());
        assert_eq!((counted.sent, counted.dropped), (sent, 1 - sent));
        sent == 1
    };
    assert!(sent(0, &asks(1, 1)), "segments of IPv4");
    assert!(!sent(TSO4, &asks(1, 1)), "the same where it wasn't negotiated");
    assert!(!sent(1, &asks(1, 0)), "a checksum where it wasn't negotiated");
    assert!(!sent(0, &asks(0, 3)), "UDP fragments");
    assert!(!sent(0, &asks(2, 0)), "a flag that only the device may set");
    assert!(!sent(0, &asks(0, 0x80)), "ECN of no segment");
    assert!(!sent(0, &[0; HEADER]), "no frame at all");
    assert!(!sent(0, &frame(0, LONGEST)), "an endless frame");
}

#[test]
fn what_the_host_refuses_is_dropped() {
    let (mut driver, wire) = driver();
    wire.cable().refuses = true;
    driver.lend(TRANSMIT, &[&frame(1, 60)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    assert_eq!(driver.device.device().counters().dropped, 1);
    assert!(!driver.needs_reset());
}

#[test]
fn a_frame_is_received_into_one_buffer() {
    let (mut driver, wire) = driver();
    let (head, at) = driver.lend(RECEIVE, &[], &[12, 100]);
    wire.cable().arriving.push_back(frame(9, 64));
    driver.device.work(Device::host_ready);
    assert_eq!(driver.used(RECEIVE), [(head, 76)]);
    assert_eq!(driver.bytes(at[0], 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(driver.bytes(at[1], 64), [9; 64]);
}

#[test]
fn a_long_frame_is_received_into_several_buffers() {
    let (mut driver, wire) = driver();
    let lent: Vec<_> = (0..4).map(|_| driver.lend(RECEIVE, &[], &[40])).collect();
    wire.cable().arriving.push_back(frame(9, 80));
    driver.device.work(Device::host_ready);
    assert_eq!(driver.used(RECEIVE), [(lent[0].0, 40), (lent[1].0, 40), (lent[2].0, 12)]);
    assert_eq!(driver.bytes(lent[0].1[0] + 10, 2), [3, 0], "the header tells the number of buffers");
    assert_eq!(driver.bytes(lent[2].1[0], 12), [9; 12]);
}

#[test]
fn a_frame_waits_for_buffers_and_the_next_behind_it() {
    let (mut driver, wire) = driver();
    driver.lend(RECEIVE, &[], &[40]);
    wire.cable().arriving.extend([frame(1, 60), frame(2, 20)]);
    driver.device.work(Device::host_ready);
    assert!(driver.used(RECEIVE).is_empty(), "half a frame is none");
    assert_eq!(wire.cable().arriving.len(), 1);
    driver.lend(RECEIVE, &[], &[40]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE).len(), 2);
    driver.lend(RECEIVE, &[], &[40]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE).len(), 1);
    assert_eq!(driver.device.device().counters(), Counters { received: 2, sent: 0, dropped: 0 });
}

#[test]
fn a_frame_that_no_buffer_can_take_is_dropped() {
    let (mut driver, wire) = driver_without(MRG_RXBUF);
    let (head, _) = driver.lend(RECEIVE, &[], &[40]);
    wire.cable().arriving.extend([frame(1, 60), vec![0; 5], frame(2, LONGEST), frame(3, 20)]);
    driver.device.work(Device::host_ready);
    assert_eq!(driver.used(RECEIVE), [(head, 32)]);
    assert_eq!(driver.device.device().counters(), Counters { received: 1, sent: 0, dropped: 3 });
}

#[test]
fn a_receive_buffer_without_room_needs_a_reset() {
    let (mut driver, wire) = driver();
    driver.lend(RECEIVE, &[], &[11]);
    wire.cable().arriving.push_back(frame(1, 60));
    driver.device.work(Device::host_ready);
    assert!(driver.needs_reset());
}

#[test]
fn a_turn_is_bounded_and_another_asked_for() {
    let (mut driver, wire) = driver();
    for _ in 0..TURN + 1 {
        driver.lend(RECEIVE, &[], &[100]);
        driver.lend(TRANSMIT, &[&frame(1, 60)], &[]);
        wire.cable().arriving.push_back(frame(2, 60));
    }
    driver.device.work(Device::host_ready);
    assert_eq!((driver.used(RECEIVE).len(), driver.used(TRANSMIT).len()), (TURN, TURN));
    assert_eq!(wire.again(), 2);
    driver.device.work(Device::host_ready);
    assert_eq!((driver.used(RECEIVE).len(), driver.used(TRANSMIT).len()), (1, 1));
    assert_eq!(wire.again(), 0);
}

/// Its flags are the host's to set only for a driver that has said that it understands them.
#[test]
fn a_driver_without_checksums_gets_no_flags() {
    for (refused, flags) in [(0, 2), (GUEST_CSUM, 0)] {
        let (mut driver, wire) = driver_without(refused);
        let (_, at) = driver.lend(RECEIVE, &[], &[100]);
        wire.cable().arriving.push_back([&[2][..], &frame(1, 60)[1..]].concat());
        driver.device.work(Device::host_ready);
        assert_eq!(driver.bytes(at[0], 1), [flags]);
    }
}

#[test]
fn the_wire_is_told_which_offloads_were_accepted() {
    let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
    assert_eq!(driver().1.cable().offloads, all);
    let (mut driver, wire) = driver_without(1 << 8);
    assert_eq!(wire.cable().offloads, Offloads { tso6: false, ..all });
    driver.write(0x70, 0);
    assert_eq!(wire.cable().offloads, Offloads::default(), "a reset takes them back");
    assert_eq!(driver_without(GUEST_CSUM).1.cable().offloads, Offloads::default(), "segments need checksums");
}

fn command(driver: &mut Driver<Net>, command: &[u8]) -> u8 {
    let (head, at) = driver.lend(CONTROL, &[command], &[1]);
    driver.notify(CONTROL);
    assert_eq!(driver.used(CONTROL), [(head, 1)]);
    driver.bytes(at[0], 1)[0]
}

#[test]
fn offloads_can_be_chosen_and_are_chosen_again_after_a_restore() {
    let (mut driver, wire) = driver();
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    let chosen = Offloads { checksum: true, tso4: true, ..Offloads::default() };
    assert_eq!(command(&mut driver, &set(GUEST_CSUM | 1 << 7)), 0);
    assert_eq!(wire.cable().offloads, chosen);
    assert_eq!(command(&mut driver, &set(1 << 10)), 1, "UFO isn't offered");
    assert_eq!(command(&mut driver, &set(0)[..9]), 1, "half a number");
    let elsewhere = TestWire::new();
    let driver = driver.restored(Box::new(elsewhere.clone()));
    assert_eq!(elsewhere.cable().offloads, chosen);
    drop(driver);
}

#[test]
fn unknown_commands_are_refused() {
    let (mut driver, _) = driver();
    for unknown in [&[][..], &[3], &[3, 1], &[0, 0, 1], &[4, 0, 1, 0], &[3, 0, 0], &[0xff; 400]] {
        assert_eq!(command(&mut driver, unknown), 1, "{unknown:?}");
    }
}

#[test]
fn a_restored_device_has_its_driver_announce_it() {
    let (driver, wire) = driver();
    let saved = driver.device.save();
    let mut driver = driver.restored(Box::new(wire));
    assert_eq!(driver.read(0x60) & 2, 2, "told as a change of configuration");
    assert_eq!(config(&mut driver)[6], 3);
    assert_eq!(command(&mut driver, &[3, 0]), 0);
    assert_eq!(config(&mut driver)[6], 1);
    assert_eq!(driver.device.save().device, saved.device);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked_to() {
    let (driver, wire) = driver_without(GUEST_ANNOUNCE);
    let mut driver = driver.restored(Box::new(wire));
    assert_eq!((driver.read(0x60) & 2, config(&mut driver)[6]), (0, 1));
    assert_eq!(command(&mut driver, &[3, 0]), 1);
}

#[test]
fn a_state_that_no_device_can_have_is_refused() {
    let refused = |state: NetState| Net::from_state(&state, Box::new(TestWire::new())).err();
    let group = Mac([1, 0, 0, 0, 0, 0]);
    assert_eq!(refused(NetState { mac: group, ..state() }), Some(MacError::NotUnicast(group).into()));
    assert_eq!(refused(NetState { mtu: Some(67), ..state() }), Some(NetStateError::Mtu(67)));
    assert_eq!(refused(NetState { offloads: Some(1), ..state() }), Some(NetStateError::Offloads(1)));
    assert_eq!(refused(state()), None);
}

#[derive(Clone, Debug)]
enum Act {
    Register(u64, u32, usize),
    Memory(u64, u16),
    Lend(usize, Vec<(u64, u32, u16)>),
    Command(Vec<u8>),
    Arrive(Vec<u8>),
    Room(Option<usize>),
    Ready,
    Restore,
}

fn acts() -> impl Strategy<Value = Act> {
    let piece = (prop_oneof![0u64..0x11_0000, any::<u64>()], prop_oneof![0u32..3000, any::<u32>()], 0u16..8);
    prop_oneof![
        3 => (0u64..0x200, any::<u32>(), 0usize..9).prop_map(|(at, value, len)| Act::Register(at, value, len)),
        2 => (0u64..0xc000, any::<u16>()).prop_map(|(at, value)| Act::Memory(at, value)),
        6 => (0usize..3, prop::collection::vec(piece, 1..6)).prop_map(|(queue, chain)| Act::Lend(queue, chain)),
        2 => prop::collection::vec(0u8..6, 0..12).prop_map(Act::Command),
        4 => prop::collection::vec(any::<u8>(), 0..3000).prop_map(Act::Arrive),
        1 => prop::option::of(0usize..3).prop_map(Act::Room),
        4 => Just(Act::Ready),
        1 => Just(Act::Restore),
    ]
}

fn act(mut driver: Driver<Net>, wire: &TestWire, act: Act) -> Driver<Net> {
    use crate::BusDevice;
    match act {
        Act::Register(offset, value, len) => {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            driver.device.write(offset, &data[..len]);
            driver.device.read(offset, &mut data[..len]);
        }
        Act::Memory(at, value) => {
            vm_memory::Bytes::write_obj(&driver.memory, value, vm_memory::GuestAddress(at)).unwrap();
        }
        Act::Lend(queue, chain) => {
            driver.lend_raw(queue, &chain);
            driver.notify(queue);
        }
        Act::Command(bytes) => {
            driver.lend_raw(CONTROL, &[(0xe_0000, bytes.len() as u32, 0), (0xe_1000, 1, 2)]);
            vm_memory::Bytes::write_slice(&driver.memory, &bytes, vm_memory::GuestAddress(0xe_0000)).unwrap();
            driver.notify(CONTROL);
        }
        Act::Arrive(bytes) => wire.cable().arriving.push_back(bytes),
        Act::Room(room) => wire.cable().room = room,
        Act::Ready => driver.device.work(Device::host_ready),
        Act::Restore => return driver.restored(Box::new(wire.clone())),
    }
    driver
}

proptest! {
    /// Whatever a driver and the host do: nothing panics or hangs, what is saved is taken back, and what reaches the wire is a
    /// frame that asks for nothing but what is offered.
    #[test]
    fn hostile_drivers(all in prop::collection::vec(acts(), 0..60), refused in any::<u64>()) {
        let (mut driver, wire) = driver_without(refused & !(1 << 32));
        for one in all {
            driver = act(driver, &wire, one);
        }
        for frame in &wire.cable().sent {
            prop_assert!(frame.len() > HEADER && may_send(&frame[..HEADER], OFFERED));
        }
    }

    /// Whatever a guest does and a snapshot holds: nothing panics or hangs, and what is saved is taken back.
    #[test]
    fn any_guest_and_any_snapshot(acts in hostile::acts()) {
        let wire = |_: &_| -> Box<dyn Wire> {
            let wire = TestWire::new();
            wire.cable().arriving.extend((0..20).map(|n| frame(n, 200 * usize::from(n))));
            wire.cable().room = Some(10);
            Box::new(wire)
        };
        hostile::attack::<Net>(state(), wire, acts);
    }
}
