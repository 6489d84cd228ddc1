//! Both ends of a vsock device for tests: a host of byte vectors, and a guest that speaks packets.

use super::host::{HostEvent, StreamId, VsockHost};
use super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{Vsock, VsockState};
use crate::virtio::testing::Driver;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use vm_memory::{Bytes, GuestAddress};

pub(super) const CID: u64 = 3;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;

/// Where packets of the guest lie; they are taken at once.
const SENT: u64 = 0xc_0000;

/// A stream of the fake host.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    pub(super) to_guest: Vec<u8>,
    pub(super) ended: bool,
    pub(super) from_guest: Vec<u8>,
    /// Bytes that it will still take; none for as many as come, `Some(Err)` once its reader is gone.
    pub(super) room: Option<Result<usize, ()>>,
    pub(super) shut: Vec<Shutdown>,
    pub(super) closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Inside {
    pub(super) events: Vec<HostEvent>,
    pub(super) pipes: BTreeMap<StreamId, Pipe>,
    pub(super) connects: Vec<u32>,
    pub(super) accepted: Vec<(StreamId, u32)>,
    pub(super) deaf: bool,
    pub(super) woken: usize,
}

/// A host whose insides the test holds too.
#[derive(Clone, Debug, Default)]
pub(super) struct FakeHost(Arc<Mutex<Inside>>);

impl FakeHost {
    pub(super) fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    /// A client asks for a port.
    pub(super) fn client(&self, port: u32) -> StreamId {
        let mut inside = self.inside();
        let stream = inside.pipes.len() as StreamId;
        inside.pipes.insert(stream, Pipe::default());
        inside.events.push(HostEvent::Asks { stream, port });
        stream
    }

    pub(super) fn ready(&self, stream: StreamId, hung_up: bool) {
        self.inside().events.push(HostEvent::Ready { stream, hung_up });
    }

    pub(super) fn with<T>(&self, stream: StreamId, change: impl FnOnce(&mut Pipe) -> T) -> T {
        change(self.inside().pipes.get_mut(&stream).unwrap())
    }
}

impl VsockHost for FakeHost {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn events(&mut self) -> Vec<HostEvent> {
        std::mem::take(&mut self.inside().events)
    }

    fn wake(&mut self) {
        self.inside().woken += 1;
    }

    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        let mut inside = self.inside();
        if inside.deaf {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        inside.connects.push(port);
        let stream = inside.pipes.len() as StreamId;
        inside.pipes.insert(stream, Pipe::default());
        Ok(stream)
    }

    fn accepted(&mut self, stream: StreamId, host_port: u32) {
        self.inside().accepted.push((stream, host_port));
    }

    fn read(&mut self, stream: StreamId, buf: &mut [u8]) -> io::Result<usize> {
        self.with(stream, |pipe| {
            let count = buf.len().min(pipe.to_guest.len());
            if count == 0 && !pipe.ended {
                return Err(ErrorKind::WouldBlock.into());
            }
            buf[..count].copy_from_slice(&pipe.to_guest[..count]);
            pipe.to_guest.drain(..count);
            Ok(count)
        })
    }

    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize> {
        self.with(stream, |pipe| {
            assert!(!pipe.closed && !pipe.shut.contains(&Shutdown::Write), "a write after the end");
            let count = match pipe.room {
                None => bytes.len(),
                Some(Ok(0)) => return Err(ErrorKind::WouldBlock.into()),
                Some(Ok(room)) => bytes.len().min(room),
                Some(Err(())) => return Err(ErrorKind::BrokenPipe.into()),
            };
            pipe.room = pipe.room.map(|room| room.map(|room| room - count));
            pipe.from_guest.extend(&bytes[..count]);
            Ok(count)
        })
    }

    fn shutdown(&mut self, stream: StreamId, how: Shutdown) {
        self.with(stream, |pipe| pipe.shut.push(how));
    }

    fn close(&mut self, stream: StreamId) {
        self.with(stream, |pipe| assert!(!std::mem::replace(&mut pipe.closed, true), "closed twice"));
    }
}

/// A guest with a vsock driver.
pub(super) struct Guest {
    pub(super) driver: Driver<Vsock>,
    lent: Vec<(u16, u64)>,
}

impl Guest {
    pub(super) fn new(host: Box<dyn VsockHost>) -> Self {
        Self { driver: Driver::new(VsockState::new(CID), host, 0), lent: Vec::new() }
    }

    pub(super) fn restored(self, host: Box<dyn VsockHost>) -> Self {
        Self { driver: self.driver.restored(host), ..self }
    }

    /// Lends `count` buffers for packets of up to `room` bytes.
    pub(super) fn lend(&mut self, count: usize, room: usize) {
        for _ in 0..count {
            let (head, at) = self.driver.lend(RX, &[], &[(HEADER_LEN + room) as u32]);
            self.lent.push((head, at[0]));
        }
        self.driver.notify(RX);
    }

    pub(super) fn lend_for_events(&mut self, count: usize) -> u64 {
        let places = (0..count).map(|_| self.driver.lend(EVENT, &[], &[4]).1[0]).collect::<Vec<_>>();
        self.driver.notify(EVENT);
        places[0]
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..header };
        self.driver.memory.write_slice(&[&header.to_bytes(), data].concat(), GuestAddress(SENT)).unwrap();
        self.driver.lend_raw(TX, &[(SENT, (HEADER_LEN + data.len()) as u32, 0)]);
        self.driver.notify(TX);
    }

    /// What the device has told since last asked.
    pub(super) fn heard(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.driver.used(RX);
        let packet = |(head, len): (u16, u32)| {
            let at = self.lent.iter().position(|lent| lent.0 == head).expect("a buffer that was not lent");
            let bytes = self.driver.bytes(self.lent.remove(at).1, len as usize);
            let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            (header, bytes[HEADER_LEN..].to_vec())
        };
        used.into_iter().map(packet).collect()
    }

    /// The same, what they are for only.
    pub(super) fn heard_ops(&mut self) -> Vec<u16> {
        self.heard().iter().map(|packet| packet.0.op).collect()
    }

    pub(super) fn host_ready(&mut self) {
        crate::virtio::Transport::host_ready(&mut self.driver.device);
    }

    /// A connection to the host's port 52 from the guest's port 7, with buffers lent.
    pub(super) fn connect(&mut self) {
        self.lend(32, 4096);
        self.send(packet(op::REQUEST), &[]);
        assert_eq!(self.heard_ops(), [op::RESPONSE]);
    }
}

/// From the guest's port 7 to the host's port 52, with credit of 64 KiB.
pub(super) fn packet(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: 52,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 64 << 10,
        ..Header::default()
    }
}
