//! The device between a guest of packets and real Unix sockets.

use super::super::packet::{Header, SHUT_BOTH, SHUT_SEND, op};
use super::super::testing::{Guest, TX, packet};
use super::*;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::Write;
use tempfile::TempDir;

const FIRST: u32 = 1 << 30;

struct Bench {
    guest: Guest,
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut guest = Guest::new(Box::new(UnixVsock::new(listener, &path).unwrap()));
        guest.lend(64, 4096);
        Self { guest, directory }
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.directory.path().join(format!("v.sock{suffix}"))
    }

    /// A client that has said this.
    fn client(&mut self, line: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.write_all(line).unwrap();
        self.guest.host_ready();
        client
    }

    /// A client whose request for port 1024 the guest has accepted.
    fn accepted(&mut self) -> UnixStream {
        let mut client = self.client(b"CONNECT 1024\n");
        assert_eq!(self.guest.heard()[0].0.op, op::REQUEST);
        self.guest.send(from_1024(op::RESPONSE), &[]);
        assert_eq!(read(&mut client, 14), b"OK 1073741824\n");
        client
    }

    /// A connection of the guest's port 7 to a listener at the host's port 52.
    fn connected(&mut self) -> UnixStream {
        let listener = UnixListener::bind(self.path("_52")).unwrap();
        self.guest.send(packet(op::REQUEST), &[]);
        assert_eq!(self.guest.heard_ops(), [op::RESPONSE]);
        listener.accept().unwrap().0
    }
}

/// From the guest's port 1024 to the first client.
fn from_1024(op: u16) -> Header {
    Header { src_port: 1024, dst_port: FIRST, ..packet(op) }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn at_end(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn a_client_asks_for_a_port_and_is_given_one() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    client.write_all(b"ping").unwrap();
    bench.guest.host_ready();
    assert_eq!(bench.guest.heard()[0].1, b"ping");
    bench.guest.send(from_1024(op::RW), b"pong");
    assert_eq!(read(&mut client, 4), b"pong");
}

#[test]
fn a_line_may_come_in_pieces_and_what_follows_is_the_guest_s() {
    let mut bench = Bench::new();
    let mut client = bench.client(b"conn");
    assert!(bench.guest.heard().is_empty());
    client.write_all(b"ect  1024\nfirst words").unwrap();
    bench.guest.host_ready();
    assert_eq!(bench.guest.heard()[0].0.dst_port, 1024);
    bench.guest.send(from_1024(op::RESPONSE), &[]);
    assert_eq!(bench.guest.heard()[0].1, b"first words");
}

#[test]
fn a_client_that_does_not_ask_properly_is_dropped() {
    let mut bench = Bench::new();
    let long = [b'1'; 40];
    let lines: [&[u8]; 9] = [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT x\n",
        b"CONNECT +5\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 5 6\n",
        b"GET / HTTP/1.1\r\n",
        &long,
    ];
    for line in lines {
        let mut client = bench.client(line);
        let mut byte = [0];
        let gone = client.read(&mut byte).map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |n| n == 0);
        assert!(gone, "{}", line.escape_ascii());
    }
    let half = bench.client(b"CONN");
    drop(half);
    bench.guest.host_ready();
    assert!(bench.guest.heard().is_empty());
}

#[test]
fn silent_clients_are_bounded() {
    let mut bench = Bench::new();
    let mut first = bench.client(b"");
    let mut second = bench.client(b"");
    let _others: Vec<UnixStream> = (1..SILENT_MAX).map(|_| bench.client(b"")).collect();
    assert!(at_end(&mut first));
    assert!(!at_end(&mut second));
}

#[test]
fn the_guest_connects_to_a_socket_named_after_the_port() {
    let mut bench = Bench::new();
    let mut server = bench.connected();
    bench.guest.send(packet(op::RW), b"ping");
    assert_eq!(read(&mut server, 4), b"ping");
    server.write_all(b"pong").unwrap();
    bench.guest.host_ready();
    assert_eq!(bench.guest.heard()[0].1, b"pong");
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut bench = Bench::new();
    bench.guest.send(packet(op::REQUEST), &[]);
    assert_eq!(bench.guest.heard_ops(), [op::RST], "no file");
    drop(UnixListener::bind(bench.path("_52")).unwrap());
    bench.guest.send(packet(op::REQUEST), &[]);
    assert_eq!(bench.guest.heard_ops(), [op::RST], "a dead socket");
    std::fs::write(bench.path("_53"), "").unwrap();
    bench.guest.send(Header { dst_port: 53, ..packet(op::REQUEST) }, &[]);
    assert_eq!(bench.guest.heard_ops(), [op::RST], "no socket");
}

#[test]
fn a_listener_that_does_not_accept_holds_nobody_up() {
    let mut bench = Bench::new();
    let listener = UnixListener::bind(bench.path("_52")).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    for port in 0..4 {
        bench.guest.send(Header { src_port: port, ..packet(op::REQUEST) }, &[]);
    }
    assert_eq!(bench.guest.heard_ops(), [op::RESPONSE, op::RESPONSE, op::RST, op::RST]);
}

#[test]
fn half_closes_pass_through() {
    let mut bench = Bench::new();
    let mut server = bench.connected();
    server.write_all(b"request").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    bench.guest.host_ready();
    let heard = bench.guest.heard();
    assert_eq!(heard[0].1, b"request");
    assert_eq!((heard[1].0.op, heard[1].0.flags), (op::SHUTDOWN, SHUT_SEND));
    bench.guest.send(packet(op::RW), b"answer");
    assert_eq!(read(&mut server, 6), b"answer");
    assert!(!at_end(&mut server));
    bench.guest.send(Header { flags: SHUT_SEND, ..packet(op::SHUTDOWN) }, &[]);
    assert!(at_end(&mut server));
}

#[test]
fn a_client_that_closes_is_gone_for_the_guest() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    client.write_all(b"bye").unwrap();
    drop(client);
    bench.guest.host_ready();
    let heard = bench.guest.heard();
    assert_eq!(heard[0].1, b"bye");
    assert_eq!((heard[1].0.op, heard[1].0.flags), (op::SHUTDOWN, SHUT_BOTH));
    bench.guest.send(from_1024(op::RW), b"anybody?");
    bench.guest.send(from_1024(op::RST), &[]);
    bench.guest.send(from_1024(op::RW), &[]);
    assert_eq!(bench.guest.heard_ops(), [op::RST], "the connection is over");
}

#[test]
fn a_guest_that_closes_is_gone_for_the_client() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    bench.guest.send(from_1024(op::RW), b"bye");
    bench.guest.send(Header { flags: SHUT_BOTH, ..from_1024(op::SHUTDOWN) }, &[]);
    assert_eq!(read(&mut client, 3), b"bye");
    assert!(at_end(&mut client));
}

#[test]
fn a_reset_of_the_device_ends_its_clients() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    bench.guest.driver.write(0x70, 0);
    assert!(at_end(&mut client));
}

/// A pattern that shows bytes lost, doubled or in another order.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn two_megabytes_go_to_a_guest_that_reads_now_and_then() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    client.set_nonblocking(true).unwrap();
    let sent = pattern(2 << 20);
    let (mut written, mut received) = (0, Vec::<u8>::new());
    while received.len() < sent.len() {
        while let Ok(count) = client.write(&sent[written..]) {
            written += count;
            if count == 0 {
                break;
            }
        }
        bench.guest.host_ready();
        let heard = bench.guest.heard();
        heard.iter().for_each(|packet| received.extend(&packet.1));
        bench.guest.driver.rewind();
        bench.guest.send(Header { fwd_cnt: received.len() as u32, ..from_1024(op::CREDIT_UPDATE) }, &[]);
        bench.guest.lend(heard.len(), 4096);
    }
    assert!(received == sent);
}

#[test]
fn two_megabytes_go_to_a_host_that_reads_now_and_then() {
    let mut bench = Bench::new();
    let mut client = bench.accepted();
    client.set_nonblocking(true).unwrap();
    let sent = pattern(2 << 20);
    let (mut written, mut forwarded, mut received) = (0, 0u32, Vec::<u8>::new());
    let mut chunk = vec![0; 50_000];
    while received.len() < sent.len() {
        // As much as the guest knows that there is room for.
        while written < sent.len() && written - (forwarded as usize) < (64 << 10) {
            let room = (64 << 10) - (written - forwarded as usize);
            let end = (written + room.min(10_000)).min(sent.len());
            bench.guest.driver.rewind();
            bench.guest.send(from_1024(op::RW), &sent[written..end]);
            written = end;
        }
        if let Ok(count) = client.read(&mut chunk) {
            received.extend(&chunk[..count]);
        }
        bench.guest.host_ready();
        let heard = bench.guest.heard();
        heard.iter().for_each(|(header, _)| forwarded = header.fwd_cnt);
        bench.guest.lend(heard.len(), 4096);
        bench.guest.driver.used(TX);
    }
    assert!(received == sent);
}

/// The monitor watches it for its edge, so it has to fall and to rise again.
#[test]
fn one_descriptor_tells_of_everything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let mut host = UnixVsock::new(UnixListener::bind(&path).unwrap(), &path).unwrap();
    host.events();
    assert!(!is_readable(&host));
    let mut client = UnixStream::connect(&path).unwrap();
    assert!(is_readable(&host));
    client.write_all(b"CONNECT 5\n").unwrap();
    let events = host.events();
    assert!(matches!(events[0], HostEvent::Asks { port: 5, .. }), "{events:?}");
    assert!(!is_readable(&host));
    client.write_all(b"x").unwrap();
    assert!(is_readable(&host));
    assert_eq!(host.events().len(), 1);
    host.wake();
    assert!(is_readable(&host));
    assert!(host.events().is_empty() && !is_readable(&host));
    drop(client);
    assert!(matches!(host.events()[..], [HostEvent::Ready { hung_up: true, .. }]));
}

#[test]
fn busy_clients_do_not_hold_up_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let mut host = UnixVsock::new(UnixListener::bind(&path).unwrap(), &path).unwrap();
    assert_eq!(host.take_events(BATCHES), []);
    let pairs: Vec<_> = (0..EVENTS + 6).map(|_| UnixStream::pair().unwrap()).collect();
    for (ours, mut client) in pairs {
        host.insert(ours).unwrap();
        client.write_all(b"x").unwrap();
    }
    let first = host.take_events(1);
    assert!(is_readable(&host), "there is more");
    let second = host.take_events(BATCHES);
    assert_eq!((first.len(), second.len()), (EVENTS, 6));
    assert!(!is_readable(&host));
}

#[test]
fn many_clients_at_once_are_all_heard() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut host = UnixVsock::new(listener, &path).unwrap();
    let clients: Vec<_> = (0..SILENT_MAX + 5)
        .map(|_| {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"CONNECT 5\n").unwrap();
            client
        })
        .collect();
    let mut asked = 0;
    while is_readable(&host) {
        let events = host.take_events(BATCHES);
        asked += events.iter().filter(|event| matches!(event, HostEvent::Asks { .. })).count();
    }
    assert_eq!(asked, clients.len());
}

fn is_readable(host: &UnixVsock) -> bool {
    let fd = host.fd().unwrap();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Default::default())).unwrap() == 1
}
