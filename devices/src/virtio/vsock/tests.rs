//! The device between a guest of packets and a host of byte vectors.

use super::packet::{HOST_CID, Header, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, TYPE_STREAM, op};
use super::testing::{CID, EVENT, FakeHost, Guest, RX, TX, packet};
use super::*;
use std::net::Shutdown;
use vm_memory::{Bytes, GuestAddress};

const NOTHING: [u16; 0] = [];

fn guest() -> (Guest, FakeHost) {
    let host = FakeHost::default();
    (Guest::new(Box::new(host.clone())), host)
}

fn connected() -> (Guest, FakeHost) {
    let (mut guest, host) = guest();
    guest.connect();
    (guest, host)
}

#[test]
fn the_guest_learns_its_context_id() {
    let (mut guest, _) = guest();
    assert_eq!([0x100, 0x104].map(|offset| guest.driver.read(offset)), [CID as u32, 0]);
}

#[test]
fn the_guest_connects_and_bytes_go_both_ways() {
    let (mut guest, host) = guest();
    guest.lend(4, 100);
    guest.send(packet(op::REQUEST), &[]);
    let answer = guest.heard()[0].0;
    assert_eq!(host.inside().connects, [52]);
    let expected = Header {
        src_cid: HOST_CID,
        dst_cid: CID,
        src_port: 52,
        dst_port: 7,
        kind: TYPE_STREAM,
        op: op::RESPONSE,
        buf_alloc: BUFFER as u32,
        ..Header::default()
    };
    assert_eq!(answer, expected);

    guest.send(packet(op::RW), b"ping");
    assert_eq!(host.with(0, |pipe| pipe.from_guest.clone()), b"ping");
    host.with(0, |pipe| pipe.to_guest.extend(b"pong"));
    host.ready(0, false);
    guest.host_ready();
    let (header, data) = guest.heard().remove(0);
    assert_eq!((header.op, header.fwd_cnt, &data[..]), (op::RW, 4, &b"pong"[..]));
}

#[test]
fn a_client_of_the_host_is_told_its_port_when_the_guest_accepts() {
    let (mut guest, host) = guest();
    guest.lend(4, 100);
    let stream = host.client(1024);
    host.with(stream, |pipe| pipe.to_guest.extend(b"early"));
    guest.host_ready();
    let (asked, _) = guest.heard().remove(0);
    assert_eq!((asked.op, asked.src_port, asked.dst_port), (op::REQUEST, 1 << 30, 1024));
    assert!(host.inside().accepted.is_empty());

    guest.send(Header { src_port: 1024, dst_port: 1 << 30, ..packet(op::RESPONSE) }, &[]);
    assert_eq!(host.inside().accepted, [(stream, 1 << 30)]);
    assert_eq!(guest.heard()[0].1, b"early");
    host.client(1024);
    guest.host_ready();
    assert_eq!(guest.heard()[0].0.src_port, (1 << 30) + 1);
}

#[test]
fn a_client_is_dropped_when_nobody_listens_in_the_guest() {
    let (mut guest, host) = guest();
    guest.lend(4, 100);
    let stream = host.client(9);
    guest.host_ready();
    guest.send(Header { src_port: 9, dst_port: 1 << 30, ..packet(op::RST) }, &[]);
    assert!(host.with(stream, |pipe| pipe.closed));
    assert_eq!(guest.heard_ops(), [op::REQUEST]);
}

#[test]
fn a_client_that_leaves_before_it_is_accepted_is_forgotten() {
    let (mut guest, host) = guest();
    let stream = host.client(9);
    host.ready(stream, true);
    guest.host_ready();
    guest.lend(4, 100);
    assert_eq!(guest.heard_ops(), NOTHING, "the guest had not heard of it");
    let stream = host.client(9);
    guest.host_ready();
    host.ready(stream, true);
    guest.host_ready();
    assert_eq!(guest.heard_ops(), [op::REQUEST, op::RST]);
    assert!(host.with(stream, |pipe| pipe.closed));
}

#[test]
fn a_slow_host_costs_a_bounded_buffer_and_then_the_connection() {
    let (mut guest, host) = connected();
    host.with(0, |pipe| pipe.room = Some(Ok(0)));
    let sent: Vec<u8> = (0..BUFFER).map(|at| (at % 251) as u8).collect();
    for part in sent.chunks(16 << 10) {
        guest.send(packet(op::RW), part);
    }
    assert_eq!(guest.heard_ops(), NOTHING, "no credit comes back");
    host.with(0, |pipe| pipe.room = None);
    host.ready(0, false);
    guest.host_ready();
    let (update, _) = guest.heard().remove(0);
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, BUFFER as u32));
    assert_eq!(host.with(0, |pipe| pipe.from_guest.clone()), sent);

    host.with(0, |pipe| pipe.room = Some(Ok(0)));
    for part in sent.chunks(16 << 10) {
        guest.send(packet(op::RW), part);
    }
    guest.send(packet(op::RW), b"one too many");
    assert_eq!(guest.heard_ops(), [op::RST]);
}

#[test]
fn more_than_any_credit_is_not_even_read() {
    let (mut guest, host) = connected();
    let header = Header { len: (BUFFER + 1) as u32, ..packet(op::RW) };
    let at = guest.driver.place(&header.to_bytes());
    guest.driver.lend_raw(TX, &[(at, 44, 0), (0x2_0000, BUFFER as u32 + 1, 0)]);
    guest.driver.notify(TX);
    assert_eq!(guest.heard_ops(), [op::RST]);
    assert!(host.with(0, |pipe| pipe.from_guest.is_empty() && pipe.closed));
}

#[test]
fn a_slow_guest_is_sent_no_more_than_it_has_room_for() {
    let (mut guest, host) = guest();
    guest.lend(8, 4096);
    guest.send(Header { buf_alloc: 10, ..packet(op::REQUEST) }, &[]);
    host.with(0, |pipe| pipe.to_guest.extend(b"0123456789abcdef"));
    host.ready(0, false);
    guest.host_ready();
    let heard = guest.heard();
    assert_eq!(
        heard.iter().map(|packet| packet.0.op).collect::<Vec<_>>(),
        [op::RESPONSE, op::RW, op::CREDIT_REQUEST]
    );
    assert_eq!(heard[1].1, b"0123456789");

    guest.send(Header { buf_alloc: 10, ..packet(op::CREDIT_UPDATE) }, &[]);
    assert_eq!(guest.heard_ops(), NOTHING, "it is not asked again before it has something to give");
    guest.send(Header { buf_alloc: 10, fwd_cnt: 4, ..packet(op::CREDIT_UPDATE) }, &[]);
    let heard = guest.heard();
    assert_eq!(heard[0].1, b"abcd");
    assert_eq!(heard[1].0.op, op::CREDIT_REQUEST);
    guest.send(Header { buf_alloc: 10, fwd_cnt: 99, ..packet(op::CREDIT_UPDATE) }, &[]);
    assert_eq!(guest.heard_ops(), NOTHING, "one that took more than it got has no credit");
}

#[test]
fn a_request_for_credit_is_answered() {
    let (mut guest, _) = connected();
    guest.send(packet(op::RW), b"abc");
    guest.send(packet(op::CREDIT_REQUEST), &[]);
    let (update, _) = guest.heard().remove(0);
    assert_eq!((update.op, update.buf_alloc, update.fwd_cnt), (op::CREDIT_UPDATE, BUFFER as u32, 3));
}

#[test]
fn connections_take_turns() {
    let (mut guest, host) = connected();
    guest.send(Header { src_port: 8, ..packet(op::REQUEST) }, &[]);
    guest.heard();
    for stream in [0, 1] {
        host.with(stream, |pipe| pipe.to_guest.extend(vec![stream as u8; 3 * 4096]));
        host.ready(stream, false);
    }
    guest.host_ready();
    let ports: Vec<u32> = guest.heard().iter().map(|packet| packet.0.dst_port).collect();
    assert_eq!(ports, [7, 8, 7, 8, 7, 8]);
}

#[test]
fn each_direction_ends_by_itself() {
    let (mut guest, host) = connected();
    host.with(0, |pipe| {
        pipe.to_guest.extend(b"last");
        pipe.ended = true;
        pipe.room = Some(Ok(0));
    });
    host.ready(0, false);
    guest.host_ready();
    let heard = guest.heard();
    assert_eq!((heard[0].0.op, &heard[0].1[..]), (op::RW, &b"last"[..]));
    assert_eq!((heard[1].0.op, heard[1].0.flags), (op::SHUTDOWN, SHUT_SEND));

    guest.send(packet(op::RW), b"words");
    guest.send(Header { flags: SHUT_SEND, ..packet(op::SHUTDOWN) }, &[]);
    assert!(host.with(0, |pipe| pipe.shut.is_empty()), "what it said comes first");
    host.with(0, |pipe| pipe.room = None);
    host.ready(0, false);
    guest.host_ready();
    assert_eq!(host.with(0, |pipe| pipe.from_guest.clone()), b"words");
    assert!(host.with(0, |pipe| pipe.shut.contains(&Shutdown::Write) && !pipe.closed));

    guest.send(Header { flags: SHUT_BOTH, ..packet(op::SHUTDOWN) }, &[]);
    assert_eq!(guest.heard_ops(), [op::RST]);
    assert!(host.with(0, |pipe| pipe.closed));
}

#[test]
fn a_guest_that_does_not_receive_any_more_is_sent_nothing() {
    let (mut guest, host) = connected();
    guest.send(Header { flags: SHUT_RECEIVE, ..packet(op::SHUTDOWN) }, &[]);
    host.with(0, |pipe| pipe.to_guest.extend(b"unheard"));
    host.ready(0, false);
    guest.host_ready();
    assert_eq!(guest.heard_ops(), NOTHING);
    assert_eq!(host.with(0, |pipe| pipe.shut.clone()), [Shutdown::Read]);
}

#[test]
fn a_client_that_is_gone_is_told_of_after_its_last_byte() {
    let (mut guest, host) = connected();
    host.with(0, |pipe| {
        pipe.to_guest.extend(vec![1; 5000]);
        (pipe.ended, pipe.room) = (true, Some(Err(())));
    });
    guest.send(packet(op::RW), b"nobody reads this");
    host.ready(0, true);
    guest.host_ready();
    let heard: Vec<(u16, u32)> = guest.heard().iter().map(|(header, _)| (header.op, header.flags)).collect();
    assert_eq!(heard.iter().filter(|packet| packet.0 == op::RW).count(), 2);
    assert_eq!(heard.last(), Some(&(op::SHUTDOWN, SHUT_BOTH)));
}

#[test]
fn a_closed_socket_s_last_words_reach_a_slow_host() {
    let (mut guest, host) = connected();
    host.with(0, |pipe| pipe.room = Some(Ok(2)));
    guest.send(packet(op::RW), b"last words");
    guest.send(Header { flags: SHUT_BOTH, ..packet(op::SHUTDOWN) }, &[]);
    assert_eq!(guest.heard_ops(), [op::RST], "the guest need not wait");
    assert!(!host.with(0, |pipe| pipe.closed));
    host.with(0, |pipe| pipe.room = None);
    host.ready(0, false);
    guest.host_ready();
    assert!(host.with(0, |pipe| pipe.closed && pipe.from_guest == b"last words"));
}

/// Section 5.10.6: what is answered with a `RST`, and what with silence.
#[test]
fn what_makes_no_sense_is_refused() {
    let (mut guest, host) = guest();
    guest.lend(32, 4096);
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        guest.send(packet(op), &[]);
        let (answer, _) = guest.heard().remove(0);
        assert_eq!((answer.op, answer.src_port, answer.dst_port), (op::RST, 52, 7), "{op} on no connection");
    }
    guest.send(Header { kind: 2, ..packet(op::REQUEST) }, &[]);
    let (answer, _) = guest.heard().remove(0);
    assert_eq!((answer.op, answer.kind), (op::RST, 2), "sockets of another type");
    host.inside().deaf = true;
    guest.send(packet(op::REQUEST), &[]);
    assert_eq!(guest.heard_ops(), [op::RST], "nobody listens");
    guest.send(packet(op::RST), &[]);
    guest.send(Header { kind: 2, ..packet(op::RST) }, &[]);
    guest.send(Header { src_cid: CID + 1, ..packet(op::RW) }, &[]);
    guest.send(Header { dst_cid: CID, ..packet(op::RW) }, &[]);
    assert_eq!(guest.heard_ops(), NOTHING, "none of these is to be answered");
    assert_eq!(guest.driver.used(TX).len(), 13, "every buffer came back");
}

#[test]
fn what_an_open_connection_can_t_take_ends_it() {
    for op in [op::REQUEST, op::RESPONSE, 0, 99] {
        let (mut guest, host) = connected();
        guest.send(packet(op), &[]);
        assert_eq!(guest.heard_ops(), [op::RST], "{op}");
        assert!(host.with(0, |pipe| pipe.closed), "{op}");
    }
    let (mut guest, _) = connected();
    guest.send(Header { flags: SHUT_SEND, ..packet(op::SHUTDOWN) }, &[]);
    guest.send(packet(op::RW), b"after the end");
    assert_eq!(guest.heard_ops(), [op::RST]);
}

#[test]
fn connections_and_refusals_are_bounded() {
    let (mut guest, host) = guest();
    let most = switch::CONNECTIONS_MAX as u32;
    for port in 0..most {
        guest.send(Header { src_port: port, ..packet(op::REQUEST) }, &[]);
        guest.driver.used(TX);
    }
    guest.lend(16, 64);
    guest.heard();
    guest.send(Header { src_port: most, ..packet(op::REQUEST) }, &[]);
    let stream = host.client(1);
    guest.host_ready();
    assert!(host.with(stream, |pipe| pipe.closed), "a client too many");
    assert_eq!(host.inside().connects.len(), most as usize);
    // Without buffers for answers, the guest is not listened to for ever.
    let mut taken = 0;
    for _ in 0..10 * most {
        guest.send(packet(99), &[]);
        let used = guest.driver.used(TX).len();
        taken += used;
        if used == 0 {
            break;
        }
    }
    assert!((100..1000).contains(&taken), "{taken}");
    guest.lend(1, 64);
    assert_eq!(guest.driver.used(TX).len(), 1, "with a buffer it goes on");
}

#[test]
fn what_is_no_packet_needs_a_reset() {
    let header = packet(op::RW).to_bytes();
    let crimes: [fn(&mut Guest, [u8; 44]); 3] = [
        |guest, header| drop(guest.driver.lend(TX, &[&header[..43]], &[])),
        |guest, mut header| {
            header[24] = 1;
            guest.driver.lend(TX, &[&header], &[]);
        },
        |guest, header| {
            guest.driver.lend(RX, &[], &[44]);
            guest.driver.lend(TX, &[&header], &[]);
        },
    ];
    for (at, crime) in crimes.iter().enumerate() {
        let (mut guest, _) = guest();
        crime(&mut guest, header);
        guest.driver.notify(TX);
        assert!(guest.driver.needs_reset(), "{at}");
    }
}

#[test]
fn a_header_may_lie_in_pieces() {
    let (mut guest, host) = connected();
    let bytes = [&Header { len: 4, ..packet(op::RW) }.to_bytes()[..], b"ping"].concat();
    guest.driver.lend(TX, &[&bytes[..1], &bytes[1..46], &bytes[46..]], &[]);
    guest.driver.notify(TX);
    assert_eq!(host.with(0, |pipe| pipe.from_guest.clone()), b"ping");
}

#[test]
fn a_reset_closes_everything() {
    let (mut guest, host) = connected();
    host.client(5);
    guest.host_ready();
    guest.driver.write(0x70, 0);
    assert!(host.with(0, |pipe| pipe.closed) && host.with(1, |pipe| pipe.closed));
}

#[test]
fn long_work_is_done_in_parts() {
    let (mut guest, host) = guest();
    let header = guest.driver.place(&packet(op::CREDIT_UPDATE).to_bytes());
    guest.driver.descriptor(TX, 0, header, 44, 0, 0);
    (0..BATCH).for_each(|_| guest.driver.offer(TX, 0));
    guest.driver.notify(TX);
    assert_eq!(host.inside().woken, 1);
}

#[test]
fn a_restored_guest_is_told_to_drop_its_connections() {
    let (mut guest, _) = connected();
    let event = guest.lend_for_events(2);
    guest.driver.memory.write_slice(&[0xff; 4], GuestAddress(event)).unwrap();
    let host = FakeHost::default();
    let mut guest = guest.restored(Box::new(host.clone()));
    assert_eq!(guest.driver.used(EVENT).len(), 1);
    assert_eq!(guest.driver.bytes(event, 4), [0; 4]);

    guest.send(packet(op::RW), b"of old");
    assert_eq!(guest.heard_ops(), [op::RST], "nothing of it is known here");
    host.client(1024);
    guest.host_ready();
    guest.send(Header { src_port: 9, ..packet(op::REQUEST) }, &[]);
    assert_eq!(guest.heard_ops(), NOTHING, "a new connection would be dropped with the old ones");
    guest.lend_for_events(1);
    assert_eq!(guest.heard_ops(), [op::REQUEST, op::RESPONSE]);
    assert!(guest.driver.used(EVENT).is_empty(), "told once");
}

#[test]
fn a_restored_guest_without_a_buffer_for_events_is_told_when_it_lends_one() {
    let (guest, _) = connected();
    let mut guest = guest.restored(Box::new(FakeHost::default()));
    assert!(guest.driver.used(EVENT).is_empty());
    guest.lend_for_events(1);
    assert_eq!(guest.driver.used(EVENT), [(0, 4)]);
}

#[test]
fn a_guest_that_was_not_restored_is_told_nothing() {
    let (mut guest, host) = connected();
    guest.lend_for_events(2);
    let before = guest.driver.device.device().save();
    crate::virtio::Transport::drain(&mut guest.driver.device, std::time::Instant::now());
    guest.send(packet(op::RW), b"on and on");
    assert_eq!(host.with(0, |pipe| pipe.from_guest.clone()), b"on and on");
    assert!(guest.driver.used(EVENT).is_empty());
    assert_eq!(guest.driver.device.device().save(), before);
}

#[test]
fn ports_of_clients_go_on_after_a_restore() {
    let (mut guest, host) = guest();
    host.client(5);
    guest.host_ready();
    let host = FakeHost::default();
    let mut guest = guest.restored(Box::new(host.clone()));
    guest.lend(1, 64);
    host.client(5);
    guest.host_ready();
    assert_eq!(guest.heard()[0].0.src_port, (1 << 30) + 1);
}

#[test]
fn a_restored_device_is_saved_as_it_was() {
    let (mut guest, host) = connected();
    guest.lend_for_events(2);
    host.client(5);
    guest.host_ready();
    let state = guest.driver.device.device().save();
    let restored = Vsock::from_state(&state, Box::new(FakeHost::default())).unwrap();
    assert_eq!(restored.save(), state);
}

#[test]
fn a_state_that_no_device_can_have_is_refused() {
    let make = |cid, next_port| {
        Vsock::from_state(&VsockState { cid, next_port }, Box::new(FakeHost::default())).err()
    };
    for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
        assert_eq!(make(cid, 1 << 30), Some(VsockStateError::Cid(cid)));
    }
    for port in [0, (1 << 30) - 1, 1 << 31] {
        assert_eq!(make(3, port), Some(VsockStateError::Port(port)));
    }
    assert_eq!(make(0xffff_fffe, (1 << 31) - 1), None);
    let error = make(2, 1 << 30).unwrap().to_string();
    assert_eq!(error, "context ID 2: expected 3 to 4294967294");
}
