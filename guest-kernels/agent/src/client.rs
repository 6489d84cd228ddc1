//! The host's side.
//!
//! In: the Unix socket of a VM's vsock device, and a wish. Out: what the guest's agent did. Holds: whatever the guest answers,
//! memory stays bounded, and all but a running command ends within the client's patience.

use crate::message::{Complaint, MAX_SEED, Reply, Request, TcpSocket};
use crate::wire::{self, Decoder, Frame, MAX_PAYLOAD, WireError};
use crate::{PORT, VERSION};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most connections that a guest may tell of.
const MAX_SOCKETS: usize = 1 << 16;
/// The longest line that the vsock device may answer with.
const MAX_LINE: usize = 32;

/// Reaches the agent of one guest. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    patience: Duration,
}

/// A command's three streams.
pub struct Streams<'a> {
    /// What the command reads. It is read by a thread that lasts until its next read ends, which may be after the command.
    pub stdin: Box<dyn Read + Send>,
    /// Where its standard output goes.
    pub stdout: &'a mut dyn Write,
    /// Where its standard error goes.
    pub stderr: &'a mut dyn Write,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(u8),
    /// By this signal.
    Signalled(u8),
}

/// Why the guest did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing has that name, or nobody listens there.
    #[error("no vsock socket at {path}: the VM may have ended: {source}", path = path.display())]
    NoSocket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The guest refused the connection.
    #[error("nothing in the guest listens on vsock port {PORT}: vmm-agent is not running there")]
    NoAgent,
    /// The guest took too long.
    #[error("no answer from the guest's agent within {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The connection ended before the answer.
    #[error("the connection to the guest's agent was lost")]
    Lost,
    /// The other side speaks another language.
    #[error("the guest's agent does not speak version {VERSION} of its protocol: {0}")]
    Strange(String),
    /// The request is too long.
    #[error("the command line has {0} bytes, at most {MAX_PAYLOAD} are allowed")]
    TooLong(usize),
    /// The agent's own words.
    #[error("the guest's agent: {}", .0.text)]
    Refused(Complaint),
    /// The connection failed.
    #[error("vsock: {0}")]
    Io(#[source] io::Error),
    /// What the command printed could not be printed here.
    #[error("cannot write the command's output: {0}")]
    Output(#[source] io::Error),
}

impl Client {
    /// The agent behind this vsock device's Unix socket; every call but [`Client::exec`] ends within `patience`.
    pub fn new(socket: &Path, patience: Duration) -> Self {
        Self { socket: socket.into(), patience }
    }

    /// Returns when the agent waits for a request, and asks for nothing.
    ///
    /// # Errors
    /// The guest can't be reached, or has no agent.
    pub fn greets(&self) -> Result<(), ClientError> {
        self.greet().map(drop)
    }

    /// Runs a program of the guest to its end. If this fails while it runs, the agent kills it.
    ///
    /// # Errors
    /// It can't be started: [`ClientError::Refused`] with the guest's `errno`. The connection is lost. The output can't be
    /// written.
    pub fn exec(&self, command: &[OsString], streams: Streams<'_>) -> Result<Ended, ClientError> {
        let mut session = self.request(&Request::Exec(command.to_vec()))?;
        session.deadline = None;
        let stream = session.stream.try_clone().map_err(ClientError::Io)?;
        stream.set_read_timeout(None).map_err(ClientError::Io)?;
        let input = session.stream.try_clone().map_err(ClientError::Io)?;
        std::thread::spawn(move || forward(streams.stdin, input));
        let ended = session.output(streams.stdout, streams.stderr);
        // A thread that is still writing input stops.
        let _ = stream.shutdown(Shutdown::Both);
        ended
    }

    /// Sets the guest's wall clock to the time since 1970-01-01 00:00 UTC that `now` tells. It is asked when the agent has
    /// answered and waits for the request: what connecting took is not missing from the guest's clock.
    ///
    /// # Errors
    /// The guest can't be reached, or refuses.
    pub fn set_clock(&self, now: impl FnOnce() -> Duration) -> Result<(), ClientError> {
        let mut session = self.greet()?;
        session.send(&Request::SetClock(now()).frame())?;
        session.sockets().map(drop)
    }

    /// Has the guest's kernel take these bytes, 1 to [`MAX_SEED`] of them, as random, and draw a new key for its generator.
    ///
    /// # Errors
    /// The guest can't be reached, or refuses.
    pub fn reseed(&self, random: &[u8]) -> Result<(), ClientError> {
        debug_assert!((1..=MAX_SEED).contains(&random.len()));
        self.request(&Request::Reseed(random.to_vec()))?.sockets().map(drop)
    }

    /// The guest's TCP connections to other machines.
    ///
    /// # Errors
    /// The guest can't be reached, or refuses.
    pub fn list_tcp(&self) -> Result<Vec<TcpSocket>, ClientError> {
        self.request(&Request::ListTcp)?.sockets()
    }

    /// Resets the guest's TCP connections to other machines and returns them: the guest's programs see an error, and the
    /// other ends a reset if the network carries it.
    ///
    /// # Errors
    /// The guest can't be reached, or refuses.
    pub fn kill_tcp(&self) -> Result<Vec<TcpSocket>, ClientError> {
        self.request(&Request::KillTcp)?.sockets()
    }

    fn request(&self, request: &Request) -> Result<Session, ClientError> {
        let frame = request.frame();
        if frame.payload.len() > MAX_PAYLOAD {
            return Err(ClientError::TooLong(frame.payload.len()));
        }
        let mut session = self.greet()?;
        session.send(&frame)?;
        Ok(session)
    }

    /// A connection on which the agent waits for a request.
    fn greet(&self) -> Result<Session, ClientError> {
        let mut session = Session::open(&self.socket, self.patience)?;
        match session.reply()? {
            Reply::Hello(VERSION) => Ok(session),
            Reply::Hello(other) => Err(ClientError::Strange(format!("its version is {other}"))),
            Reply::Failed(complaint) => Err(refused(complaint)),
            other => Err(unexpected(&other)),
        }
    }
}

/// A connection to the agent.
struct Session {
    stream: UnixStream,
    decoder: Decoder,
    patience: Duration,
    deadline: Option<Instant>,
}

impl Session {
    /// Connects in the convention of Firecracker's vsock device: `CONNECT <port>`, and `OK <the host's port>` back.
    fn open(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::NoSocket { path: path.into(), source })?;
        let deadline = Instant::now().checked_add(patience);
        let mut session = Self { stream, decoder: Decoder::default(), patience, deadline };
        session.stream.set_write_timeout(Some(patience)).map_err(ClientError::Io)?;
        writeln!(session.stream, "CONNECT {PORT}").map_err(|e| session.failed(e.into()))?;
        let line = session.line()?;
        let port = line.strip_prefix("OK ").and_then(|port| port.parse::<u32>().ok());
        port.map(|_| session).ok_or_else(|| ClientError::Strange(format!("instead of OK it says {line:?}")))
    }

    /// A line, byte by byte, since frames may follow.
    fn line(&mut self) -> Result<String, ClientError> {
        let mut line = Vec::new();
        while line.len() < MAX_LINE {
            self.arm()?;
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                // The device closes the connection when the guest refuses it.
                Ok(0) if line.is_empty() => return Err(ClientError::NoAgent),
                Ok(0) => return Err(ClientError::Lost),
                Ok(_) if byte == *b"\n" => return Ok(String::from_utf8_lossy(&line).into_owned()),
                Ok(_) => line.push(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::NoAgent),
                Err(e) => return Err(self.failed(e.into())),
            }
        }
        Err(ClientError::Strange("the line that says OK has no end".into()))
    }

    /// The next read takes no longer than there is time.
    fn arm(&self) -> Result<(), ClientError> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::TimedOut(self.patience));
        }
        self.stream.set_read_timeout(Some(left)).map_err(ClientError::Io)
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ClientError> {
        wire::send(&mut self.stream, frame).map_err(|e| self.failed(e))
    }

    fn reply(&mut self) -> Result<Reply, ClientError> {
        loop {
            match self.decoder.take() {
                Ok(Some(frame)) => return Reply::decode(frame).map_err(|e| self.failed(e)),
                Ok(None) => self.arm()?,
                Err(e) => return Err(self.failed(e)),
            }
            match self.decoder.fill(&mut self.stream) {
                Ok(0) => return Err(ClientError::Lost),
                Ok(_) => {}
                Err(e) => return Err(self.failed(e.into())),
            }
        }
    }

    /// Replies until the last, of a request that is not a command.
    fn sockets(mut self) -> Result<Vec<TcpSocket>, ClientError> {
        let mut sockets = Vec::new();
        loop {
            match self.reply()? {
                Reply::Socket(socket) if sockets.len() < MAX_SOCKETS => sockets.push(socket),
                Reply::Done => return Ok(sockets),
                Reply::Failed(complaint) => return Err(refused(complaint)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Passes on what a command prints until it ends.
    fn output(mut self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<Ended, ClientError> {
        let print = |to: &mut dyn Write, bytes: &[u8]| {
            to.write_all(bytes).and_then(|()| to.flush()).map_err(ClientError::Output)
        };
        loop {
            match self.reply()? {
                Reply::Stdout(bytes) => print(stdout, &bytes)?,
                Reply::Stderr(bytes) => print(stderr, &bytes)?,
                Reply::Exited(status) => return Ok(Ended::Exited(status)),
                Reply::Signalled(signal) => return Ok(Ended::Signalled(signal)),
                Reply::Failed(complaint) => return Err(refused(complaint)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    fn failed(&self, error: WireError) -> ClientError {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, WouldBlock};
        match error {
            WireError::Io(e) if matches!(e.kind(), WouldBlock | TimedOut) => {
                ClientError::TimedOut(self.patience)
            }
            WireError::Io(e) if matches!(e.kind(), BrokenPipe | ConnectionReset) => ClientError::Lost,
            WireError::Io(e) => ClientError::Io(e),
            other => ClientError::Strange(other.to_string()),
        }
    }
}

/// Sends what can be read, then the end. Whatever fails ends it: the other direction tells what became of the command.
fn forward(mut from: impl Read, mut to: UnixStream) {
    // A command need not read.
    let _ = to.set_write_timeout(None);
    let mut block = [0; 16 << 10];
    loop {
        let count = match from.read(&mut block) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            result => result.unwrap_or(0),
        };
        let sent = wire::send(&mut to, &Request::Stdin(block[..count].to_vec()).frame());
        if count == 0 || sent.is_err() {
            return;
        }
    }
}

/// The guest's text becomes part of a line here.
fn refused(complaint: Complaint) -> ClientError {
    let text = complaint.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    ClientError::Refused(Complaint { text, ..complaint })
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Strange(format!("a reply of kind {} came where it means nothing", reply.frame().kind))
}
