//! Guests and hosts that do anything, in any order.

use super::packet::Header;
use super::testing::{CID, FakeHost, TX, packet};
use super::*;
use crate::virtio::hostile;
use crate::virtio::testing::Driver;
use proptest::prelude::*;

/// What the two sides of the hostile test do, in any order.
#[derive(Clone, Debug)]
enum Act {
    Send { op: u16, kind: u16, ports: (u8, u8), flags: u32, credit: (u32, u32), len: u16 },
    Lend { queue: usize, len: u32 },
    Raw { queue: usize, at: u64, len: u32, flags: u16 },
    Client(u8),
    Stream { stream: u8, bytes: u16, ended: bool, hung_up: bool, room: Option<u16> },
    Register { offset: u64, value: u32 },
    Restore,
}

fn act() -> impl Strategy<Value = Act> {
    let packets = (0u16..9, 0u16..8, (0u8..3, 0u8..3), 0u32..4, any::<(u32, u32)>(), 0u16..2000);
    let streams = (0u8..4, 0u16..9000, any::<bool>(), any::<bool>(), any::<Option<u16>>());
    prop_oneof![
        12 => packets.prop_map(|(op, kind, ports, flags, credit, len)| {
            // Most are of the right type.
            Act::Send { op, kind: if kind == 0 { 0 } else { 1 }, ports, flags, credit, len }
        }),
        4 => (0usize..3, 40u32..5000).prop_map(|(queue, len)| Act::Lend { queue, len }),
        1 => (0usize..3, 0u64..0x11_0000, any::<u32>(), 0u16..8)
            .prop_map(|(queue, at, len, flags)| Act::Raw { queue, at, len, flags }),
        3 => (0u8..3).prop_map(Act::Client),
        6 => streams.prop_map(|(stream, bytes, ended, hung_up, room)| {
            Act::Stream { stream, bytes, ended, hung_up, room }
        }),
        1 => (0u64..0x110, any::<u32>()).prop_map(|(offset, value)| Act::Register { offset: offset & !3, value }),
        1 => Just(Act::Restore),
    ]
}

/// Clients' ports start at 2³⁰, the guest's connections at 0: both are hit.
fn host_port(port: u8) -> u32 {
    if port == 0 { 52 } else { (1 << 30) + u32::from(port) - 1 }
}

fn perform(mut driver: Driver<Vsock>, host: &mut FakeHost, act: Act) -> Driver<Vsock> {
    match act {
        Act::Send { op, kind, ports, flags, credit: (buf_alloc, fwd_cnt), len } => {
            let (src_port, dst_port) = (u32::from(ports.0), host_port(ports.1));
            let data = vec![ports.0; usize::from(len)];
            let header = Header { kind, flags, src_port, dst_port, buf_alloc, fwd_cnt, ..packet(op) };
            let header = Header { len: data.len() as u32, ..header };
            driver.rewind();
            driver.lend(TX, &[&header.to_bytes(), &data], &[]);
            driver.notify(TX);
        }
        Act::Lend { queue, len } => {
            driver.rewind();
            driver.lend(queue, &[], &[len]);
            driver.notify(queue);
        }
        Act::Raw { queue, at, len, flags } => {
            driver.lend_raw(queue, &[(at, len, flags)]);
            driver.notify(queue);
        }
        Act::Client(port) => drop(host.client(port.into())),
        Act::Stream { stream, bytes, ended, hung_up, room } => {
            if let Some(pipe) = host.inside().pipes.get_mut(&stream.into()) {
                pipe.to_guest.extend(vec![stream; bytes.into()]);
                pipe.ended |= ended;
                pipe.room = room.map(|room| if room == 0 { Err(()) } else { Ok(room.into()) });
            }
            host.ready(stream.into(), hung_up);
        }
        Act::Register { offset, value } => driver.write(offset, value),
        Act::Restore => {
            *host = FakeHost::default();
            driver = driver.restored(Box::new(host.clone()));
        }
    }
    crate::virtio::Transport::host_ready(&mut driver.device);
    if driver.needs_reset() {
        driver.start_over(0);
    }
    driver
}

proptest! {
    /// No order of packets, buffers, host events, register writes and restores panics, hangs, closes a stream twice or
    /// writes to one after its end.
    #[test]
    fn hostile_guests_and_hosts(acts in prop::collection::vec(act(), 0..200)) {
        let mut host = FakeHost::default();
        let mut driver = Driver::new(VsockState::new(CID), Box::new(host.clone()) as Box<dyn VsockHost>, 0);
        for act in acts {
            driver = perform(driver, &mut host, act);
        }
    }

    /// Whatever a guest does and a snapshot holds: nothing panics or hangs, and what is saved is taken back.
    #[test]
    fn any_guest_and_any_snapshot(acts in hostile::acts()) {
        let open = |_: &_| -> Box<dyn VsockHost> {
            let host = FakeHost::default();
            for port in 1..4 {
                let stream = host.client(port);
                host.with(stream, |pipe| pipe.to_guest = vec![7; 5000]);
                host.ready(stream, false);
            }
            Box::new(host)
        };
        hostile::attack::<Vsock>(VsockState::new(CID), open, acts);
    }
}
