//! All connections of a device, and who is next to speak to the guest.
//!
//! In: packets from the guest, events of the host. Out: packets to the guest, one at a time, each connection in turn.
//! Holds: connections, answers to the guest and what is kept for closed sockets are bounded.

use super::connection::{Connection, Phase, Verdict, flush};
use super::host::{HostEvent, StreamId, VsockHost};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Most connections, those that are closed and not yet flushed among them. Each has a descriptor of the process.
pub(super) const CONNECTIONS_MAX: usize = 512;
/// With that many `RST`s waiting for buffers, the guest's packets wait too.
const RESETS_MAX: usize = 512;
/// Ports that clients of the host have, as in Firecracker.
pub(super) const HOST_PORTS: Range<u32> = 1 << 30..1 << 31;

/// The host's port and the guest's.
type Key = (u32, u32);

/// The connections of a device.
pub(super) struct Switch {
    cid: u64,
    next_port: u32,
    host: Box<dyn VsockHost>,
    connections: BTreeMap<Key, Connection>,
    streams: BTreeMap<StreamId, Key>,
    /// Streams whose connection is over, with what they have still to take.
    lingering: BTreeMap<StreamId, VecDeque<u8>>,
    /// Connections that may have something for the guest.
    row: VecDeque<Key>,
    resets: VecDeque<Header>,
    held: bool,
}

impl Switch {
    /// Without a connection.
    pub(super) fn new(cid: u64, next_port: u32, host: Box<dyn VsockHost>) -> Self {
        let (connections, streams, lingering) = Default::default();
        let (row, resets, held) = Default::default();
        Self { cid, next_port, host, connections, streams, lingering, row, resets, held }
    }

    /// The guest's context ID.
    pub(super) fn cid(&self) -> u64 {
        self.cid
    }

    /// The port that the next client of the host gets.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// The host's side.
    pub(super) fn host(&mut self) -> &mut dyn VsockHost {
        &mut *self.host
    }

    /// See [`VsockHost::fd`].
    pub(super) fn host_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.host.fd()
    }

    /// Ends everything without a word to the guest.
    pub(super) fn clear(&mut self) {
        let streams = self.streams.keys().chain(self.lingering.keys());
        streams.for_each(|&stream| self.host.close(stream));
        self.connections.clear();
        self.streams.clear();
        self.lingering.clear();
        self.row.clear();
        self.resets.clear();
        self.held = false;
    }

    /// Whether the guest is told nothing of connections now, but that they are none.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_news(&self) -> bool {
        !self.resets.is_empty() || (!self.held && !self.row.is_empty())
    }

    /// Whether the guest has to take answers before it is listened to.
    pub(super) fn is_clogged(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Takes in what has happened in the host.
    pub(super) fn hear_host(&mut self) {
        for event in self.host.events() {
            match event {
                HostEvent::Asks { stream, port } => self.client_asks(stream, port),
                HostEvent::Ready { stream, hung_up } => self.stream_is_ready(stream, hung_up),
            }
        }
    }

    fn client_asks(&mut self, stream: StreamId, guest_port: u32) {
        match self.free_port(guest_port) {
            Some(host_port) if !self.is_full() => self.insert((host_port, guest_port), stream, Phase::Ask),
            _ => self.host.close(stream),
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.lingering.len() >= CONNECTIONS_MAX
    }

    fn free_port(&mut self, guest_port: u32) -> Option<u32> {
        for _ in 0..=CONNECTIONS_MAX {
            let port = self.next_port;
            self.next_port = if port + 1 < HOST_PORTS.end { port + 1 } else { HOST_PORTS.start };
            if !self.connections.contains_key(&(port, guest_port)) {
                return Some(port);
            }
        }
        None
    }

    fn insert(&mut self, key: Key, stream: StreamId, phase: Phase) {
        self.connections.insert(key, Connection::new(stream, phase));
        self.streams.insert(stream, key);
        self.line_up(key);
    }

    fn line_up(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !std::mem::replace(&mut connection.in_row, true)
        {
            self.row.push_back(key);
        }
    }

    fn stream_is_ready(&mut self, stream: StreamId, hung_up: bool) {
        if let Some(backlog) = self.lingering.get_mut(&stream) {
            if !flush(backlog, stream, &mut *self.host) || backlog.is_empty() {
                self.lingering.remove(&stream);
                self.host.close(stream);
            }
        } else if let Some(&key) = self.streams.get(&stream)
            && let Some(connection) = self.connections.get_mut(&key)
        {
            let knows = connection.phase() != Phase::Ask;
            match connection.stream_is_ready(hung_up, &mut *self.host) {
                Verdict::Keep => self.line_up(key),
                Verdict::End => {
                    self.remove(key);
                    if knows {
                        self.resets.push_back(self.header(key, op::RST, 0));
                    }
                }
            }
        }
    }

    /// A packet from the guest.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        // Nobody else is there to be spoken for, or to.
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = (header.dst_port, header.src_port);
        let known = self.connections.contains_key(&key);
        match header.op {
            _ if header.kind != TYPE_STREAM => self.refuse(header),
            op::REQUEST if !known => self.guest_asks(key, header),
            op::RST => self.remove(key),
            _ => match self.connections.get_mut(&key) {
                Some(connection) => {
                    connection.hear_credit(header);
                    if connection.receive(header, data, &mut *self.host) == Verdict::End {
                        self.remove(key);
                        self.refuse(header);
                    } else {
                        self.line_up(key);
                    }
                }
                None => self.refuse(header),
            },
        }
    }

    /// A packet from the guest whose data is beyond anybody's credit, and was not read.
    pub(super) fn receive_too_much(&mut self, header: &Header) {
        self.receive(&Header { op: op::INVALID, ..*header }, &[]);
    }

    fn guest_asks(&mut self, key: Key, header: &Header) {
        if self.is_full() {
            return self.refuse(header);
        }
        let Ok(stream) = self.host.connect(key.0) else { return self.refuse(header) };
        self.insert(key, stream, Phase::Answer);
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.hear_credit(header);
        }
    }

    /// Section 5.10.6.4: a `RST`, of the same type as what it answers, and never to a `RST`.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            let key = (header.dst_port, header.src_port);
            self.resets.push_back(Header { kind: header.kind, ..self.header(key, op::RST, 0) });
        }
    }

    /// A connection is over. What the guest sent before still goes to the host.
    fn remove(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else { return };
        if connection.in_row {
            self.row.retain(|&other| other != key);
        }
        let stream = connection.stream;
        self.streams.remove(&stream);
        let backlog = connection.into_backlog();
        if backlog.is_empty() {
            self.host.close(stream);
        } else {
            self.lingering.insert(stream, backlog);
        }
    }

    /// The next packet to the guest, with at most `room` bytes of `data`.
    pub(super) fn next(&mut self, room: usize, data: &mut Vec<u8>) -> Option<Header> {
        data.clear();
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while !self.held
            && let Some(key) = self.row.pop_front()
        {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            let Some((op, flags)) = connection.next(room, &mut *self.host, data) else {
                connection.in_row = false;
                continue;
            };
            self.row.push_back(key);
            let mut header = Header { len: data.len() as u32, ..header(self.cid, key, op, flags) };
            connection.tell_credit(&mut header);
            return Some(header);
        }
        None
    }

    fn header(&self, key: Key, op: u16, flags: u32) -> Header {
        header(self.cid, key, op, flags)
    }
}

fn header(cid: u64, (host_port, guest_port): Key, op: u16, flags: u32) -> Header {
    let (src_cid, dst_cid, src_port, dst_port) = (HOST_CID, cid, host_port, guest_port);
    Header { src_cid, dst_cid, src_port, dst_port, kind: TYPE_STREAM, op, flags, ..Header::default() }
}
