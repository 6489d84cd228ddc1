//! What a vsock device asks of its host: byte streams.
//!
//! In: ports to connect to, bytes. Out: clients that ask for a port of the guest, bytes. Holds: no call waits.

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;

/// A stream's name, never used twice by one host end.
pub type StreamId = u64;

/// What has happened in the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A client asks for a port of the guest.
    Asks {
        /// The client's stream.
        stream: StreamId,
        /// The port.
        port: u32,
    },
    /// A stream has bytes, or room for some, or came to an end.
    Ready {
        /// Which.
        stream: StreamId,
        /// Its client has closed both directions.
        hung_up: bool,
    },
}

/// The host's side of a vsock device.
pub trait VsockHost: Send {
    /// Readable when there are events.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// What has happened since last asked. A stream is ready once for all that came until then: who was told reads and
    /// writes until it would block.
    fn events(&mut self) -> Vec<HostEvent>;

    /// Has [`VsockHost::fd`] become readable again, without an event.
    fn wake(&mut self);

    /// The guest connects to `port` of the host.
    ///
    /// # Errors
    /// Nobody listens there, or the host has no more streams to give.
    fn connect(&mut self, port: u32) -> io::Result<StreamId>;

    /// The guest has accepted a client, which is told its own port.
    fn accepted(&mut self, stream: StreamId, host_port: u32);

    /// Reads some bytes; none at the end.
    ///
    /// # Errors
    /// `WouldBlock`, or the stream is no more.
    fn read(&mut self, stream: StreamId, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes some bytes.
    ///
    /// # Errors
    /// `WouldBlock`, or nobody will ever read them.
    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize>;

    /// Ends one direction, or both.
    fn shutdown(&mut self, stream: StreamId, how: Shutdown);

    /// Forgets a stream.
    fn close(&mut self, stream: StreamId);
}
