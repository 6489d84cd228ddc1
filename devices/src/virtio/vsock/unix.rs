//! Streams of the host as Unix sockets, in the convention of Firecracker.
//!
//! In: clients of one listening socket, each of which says `CONNECT <port>\n` first. Out: to them `OK <host port>\n`, and
//! connections to `<path>_<port>` for the guest's. Holds: all descriptors are non-blocking, behind one epoll descriptor.

use super::host::{HostEvent, StreamId, VsockHost};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The longest line that a client may ask with, its end included.
const LINE_MAX: usize = 32;
/// Most clients that have not asked yet. With one more, the one that took longest is dropped.
const SILENT_MAX: usize = 64;
/// Events taken at a time.
const EVENTS: usize = 64;
/// Most times that events are taken before others have their turn.
const BATCHES: usize = 16;

const LISTENER: StreamId = 0;
const WAKE: StreamId = 1;

/// Unix sockets as the host's side of a vsock device.
#[derive(Debug)]
pub struct UnixVsock {
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    wake: OwnedFd,
    streams: BTreeMap<StreamId, UnixStream>,
    /// What those that have not asked yet have said so far.
    silent: BTreeMap<StreamId, Vec<u8>>,
    next: StreamId,
    /// The process had no descriptor left for a client.
    starved: bool,
    /// There may be more clients than were taken in at once.
    crowded: bool,
}

impl UnixVsock {
    /// Clients come to `listener`; the guest's connections go to `path` with `_` and the port added.
    ///
    /// # Errors
    /// The kernel has no more descriptors to give.
    pub fn new(listener: UnixListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watch(&epoll, &listener, LISTENER)?;
        watch(&epoll, &wake, WAKE)?;
        let (streams, silent) = Default::default();
        let path = path.to_owned();
        Ok(Self {
            path,
            listener,
            epoll,
            wake,
            streams,
            silent,
            next: WAKE + 1,
            starved: false,
            crowded: false,
        })
    }

    fn insert(&mut self, stream: UnixStream) -> io::Result<StreamId> {
        let id = self.next;
        self.next += 1;
        watch(&self.epoll, &stream, id)?;
        self.streams.insert(id, stream);
        Ok(id)
    }

    /// A client that comes when there are no descriptors waits until one is closed; one behind many others, until the next time.
    fn accept(&mut self) {
        (self.starved, self.crowded) = (false, false);
        for _ in 0..SILENT_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(e) => {
                    self.starved = e.kind() != ErrorKind::WouldBlock;
                    return;
                }
            }
        }
        self.crowded = true;
    }

    fn welcome(&mut self, stream: UnixStream) {
        if self.silent.len() >= SILENT_MAX
            && let Some((oldest, _)) = self.silent.pop_first()
        {
            self.streams.remove(&oldest);
        }
        if stream.set_nonblocking(true).is_ok()
            && let Ok(id) = self.insert(stream)
        {
            self.silent.insert(id, Vec::new());
        }
    }

    fn stream_is_ready(&mut self, stream: StreamId, flags: EventFlags, news: &mut Vec<HostEvent>) {
        if self.silent.contains_key(&stream) {
            let Some(port) = self.listen_to(stream) else { return };
            news.push(HostEvent::Asks { stream, port });
        }
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        news.push(HostEvent::Ready { stream, hung_up });
    }

    /// Reads on in a client's first line, and no byte further: what follows is for the guest.
    fn listen_to(&mut self, stream: StreamId) -> Option<u32> {
        let (socket, line) = (self.streams.get_mut(&stream)?, self.silent.get_mut(&stream)?);
        let mut byte = [0];
        while line.len() < LINE_MAX {
            match socket.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
            if byte[0] == b'\n' {
                break;
            }
        }
        let asked = parse(line);
        self.silent.remove(&stream);
        if asked.is_none() {
            self.close(stream);
        }
        asked
    }

    /// Until epoll has no more, or the edge of its own descriptor would be lost; or until others must have their turn, since
    /// busy clients need not let it come to an end.
    fn take_events(&mut self, batches: usize) -> Vec<HostEvent> {
        let mut news = Vec::new();
        let mut batch = Vec::with_capacity(EVENTS);
        if self.starved || self.crowded {
            self.accept();
        }
        let mut more = true;
        for _ in 0..batches {
            batch.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut batch), Some(&Default::default())) {
                Ok(count) => more = count > 0,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => more = false,
            }
            if !more {
                break;
            }
            for event in &batch {
                let (flags, data) = (event.flags, event.data);
                match data.u64() {
                    LISTENER => self.accept(),
                    WAKE => {}
                    stream => self.stream_is_ready(stream, flags, &mut news),
                }
            }
        }
        if more || self.crowded {
            self.wake();
        }
        news
    }

    fn path_of(&self, port: u32) -> OsString {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, id: StreamId) -> io::Result<()> {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    Ok(epoll::add(epoll, fd, EventData::new_u64(id), flags)?)
}

/// `CONNECT <port>\n`, in any case and with any spaces, as Firecracker takes it.
fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    if !command.eq_ignore_ascii_case("connect") || words.next().is_some() || port.starts_with('+') {
        return None;
    }
    port.parse().ok()
}

impl VsockHost for UnixVsock {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn events(&mut self) -> Vec<HostEvent> {
        self.take_events(BATCHES)
    }

    /// The edge is enough: the count is never read, and can't overflow in the life of a machine.
    fn wake(&mut self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        let address = SocketAddrUnix::new(self.path_of(port))?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A listener whose queue is full says EAGAIN, and is one that does not listen.
        rustix::net::connect(&socket, &address)?;
        self.insert(socket.into())
    }

    fn accepted(&mut self, stream: StreamId, host_port: u32) {
        // Nothing has been written to it before, so there is room. A client that is gone shows in what comes next.
        let _ = self.write(stream, format!("OK {host_port}\n").as_bytes());
    }

    fn read(&mut self, stream: StreamId, buf: &mut [u8]) -> io::Result<usize> {
        retry(|| self.streams.get(&stream).ok_or(ErrorKind::NotConnected)?.read(buf))
    }

    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize> {
        let socket = self.streams.get(&stream).ok_or(ErrorKind::NotConnected)?;
        retry(|| Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)?))
    }

    fn shutdown(&mut self, stream: StreamId, how: Shutdown) {
        if let Some(socket) = self.streams.get(&stream) {
            // One that the client has closed can't be shut down, and needn't.
            let _ = socket.shutdown(how);
        }
    }

    fn close(&mut self, stream: StreamId) {
        self.silent.remove(&stream);
        if self.streams.remove(&stream).is_some() && self.starved {
            self.wake();
        }
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
#[path = "unix_tests.rs"]
mod tests;
