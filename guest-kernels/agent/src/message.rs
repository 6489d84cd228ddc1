//! What frames mean.
//!
//! In: frames. Out: requests and replies, and the other way round. Holds: what is decoded is whole: lengths fit, commands
//! have a name, texts are short.

use crate::wire::{Frame, MAX_PAYLOAD, WireError};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

/// Most bytes of one [`Request::Reseed`].
pub const MAX_SEED: usize = 512;
/// Most bytes of a complaint's text.
const MAX_TEXT: usize = 1024;

// The client's kinds, and from 16 on the agent's.
const EXEC: u32 = 1;
const STDIN: u32 = 2;
const SET_CLOCK: u32 = 3;
const RESEED: u32 = 4;
const LIST_TCP: u32 = 5;
const KILL_TCP: u32 = 6;
const HELLO: u32 = 16;
const STDOUT: u32 = 17;
const STDERR: u32 = 18;
const EXITED: u32 = 19;
const SIGNALLED: u32 = 20;
const SOCKET: u32 = 21;
const DONE: u32 = 22;
const FAILED: u32 = 23;

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Run a program, found on the agent's `PATH`, with these arguments; the first is its name.
    Exec(Vec<OsString>),
    /// Bytes for the command's standard input; none are its end.
    Stdin(Vec<u8>),
    /// Set the wall clock to this time after 1970-01-01 00:00 UTC.
    SetClock(Duration),
    /// Mix these bytes into the kernel's random pool, count them as random, and draw a new key.
    Reseed(Vec<u8>),
    /// Tell of every TCP connection to another machine.
    ListTcp,
    /// Reset every TCP connection to another machine, and tell which.
    KillTcp,
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The first frame of a connection: the version of the protocol.
    Hello(u32),
    /// What the command wrote to standard output.
    Stdout(Vec<u8>),
    /// What it wrote to standard error.
    Stderr(Vec<u8>),
    /// The command's exit status; the last frame.
    Exited(u8),
    /// The signal that ended it; the last frame.
    Signalled(u8),
    /// One TCP connection.
    Socket(TcpSocket),
    /// All was done; the last frame.
    Done,
    /// It could not be done; the last frame.
    Failed(Complaint),
}

/// Why the agent could not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The guest's `errno`, 0 if there is none.
    pub errno: i32,
    /// One line.
    pub text: String,
}

/// A TCP connection, as the guest's kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// The guest's end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// The state, as in `include/net/tcp_states.h`; 1 is established.
    pub state: u8,
}

impl Request {
    /// The frame that says this.
    pub fn frame(&self) -> Frame {
        match self {
            Self::Exec(words) => frame(EXEC, words.iter().flat_map(|word| terminated(word)).collect()),
            Self::Stdin(bytes) => frame(STDIN, bytes.clone()),
            Self::SetClock(time) => frame(SET_CLOCK, nanoseconds(*time).to_le_bytes().to_vec()),
            Self::Reseed(bytes) => frame(RESEED, bytes.clone()),
            Self::ListTcp => frame(LIST_TCP, Vec::new()),
            Self::KillTcp => frame(KILL_TCP, Vec::new()),
        }
    }

    /// What a frame says.
    ///
    /// # Errors
    /// [`WireError::Unexpected`].
    pub fn decode(frame: Frame) -> Result<Self, WireError> {
        let Frame { kind, payload } = frame;
        match kind {
            EXEC => words(&payload).map(Self::Exec),
            STDIN => Ok(Self::Stdin(payload)),
            SET_CLOCK => Ok(Self::SetClock(Duration::from_nanos(u64::from_le_bytes(exact(kind, &payload)?)))),
            RESEED if (1..=MAX_SEED).contains(&payload.len()) => Ok(Self::Reseed(payload)),
            LIST_TCP => exact(kind, &payload).map(|[]| Self::ListTcp),
            KILL_TCP => exact(kind, &payload).map(|[]| Self::KillTcp),
            _ => Err(strange("request", kind, &payload)),
        }
    }
}

impl Reply {
    /// The frame that says this.
    pub fn frame(&self) -> Frame {
        match self {
            Self::Hello(version) => frame(HELLO, version.to_le_bytes().to_vec()),
            Self::Stdout(bytes) => frame(STDOUT, bytes.clone()),
            Self::Stderr(bytes) => frame(STDERR, bytes.clone()),
            Self::Exited(status) => frame(EXITED, vec![*status]),
            Self::Signalled(signal) => frame(SIGNALLED, vec![*signal]),
            Self::Socket(socket) => frame(SOCKET, socket.encode()),
            Self::Done => frame(DONE, Vec::new()),
            Self::Failed(complaint) => {
                let text = complaint.text.as_bytes();
                let text = &text[..text.len().min(MAX_TEXT)];
                frame(FAILED, [&complaint.errno.to_le_bytes(), text].concat())
            }
        }
    }

    /// What a frame says.
    ///
    /// # Errors
    /// [`WireError::Unexpected`].
    pub fn decode(frame: Frame) -> Result<Self, WireError> {
        let Frame { kind, payload } = frame;
        match kind {
            HELLO => Ok(Self::Hello(u32::from_le_bytes(exact(kind, &payload)?))),
            STDOUT => Ok(Self::Stdout(payload)),
            STDERR => Ok(Self::Stderr(payload)),
            EXITED => exact(kind, &payload).map(|[status]| Self::Exited(status)),
            SIGNALLED => exact(kind, &payload).map(|[signal]| Self::Signalled(signal)),
            SOCKET => exact(kind, &payload).and_then(|bytes| TcpSocket::decode(&bytes)).map(Self::Socket),
            DONE => exact(kind, &payload).map(|[]| Self::Done),
            FAILED if payload.len() <= 4 + MAX_TEXT => Ok(Self::Failed(Complaint::decode(&payload)?)),
            _ => Err(strange("reply", kind, &payload)),
        }
    }
}

impl Complaint {
    fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let (errno, text) =
            payload.split_first_chunk().ok_or_else(|| strange("complaint", FAILED, payload))?;
        let text = String::from_utf8_lossy(text).into_owned();
        Ok(Self { errno: i32::from_le_bytes(*errno), text })
    }
}

/// Family (4 or 6), state, local port, peer port, two bytes of nothing, and both addresses in 16 bytes each.
const SOCKET_LEN: usize = 40;

impl TcpSocket {
    fn encode(&self) -> Vec<u8> {
        let family = if self.local.is_ipv4() { 4 } else { 6 };
        let (local, peer) = (self.local.port().to_le_bytes(), self.peer.port().to_le_bytes());
        let ports = [local, peer, [0; 2]].concat();
        [vec![family, self.state], ports, address(self.local.ip()).into(), address(self.peer.ip()).into()]
            .concat()
    }

    fn decode(bytes: &[u8; SOCKET_LEN]) -> Result<Self, WireError> {
        let [family, state, l0, l1, p0, p1, _, _, addresses @ ..] = bytes;
        let (local, peer) = addresses.split_at(16);
        let (Some(local), Some(peer)) = (ip(*family, local), ip(*family, peer)) else {
            return Err(strange("socket", SOCKET, bytes));
        };
        let local = SocketAddr::new(local, u16::from_le_bytes([*l0, *l1]));
        let peer = SocketAddr::new(peer, u16::from_le_bytes([*p0, *p1]));
        Ok(Self { local, peer, state: *state })
    }
}

impl fmt::Display for TcpSocket {
    /// The guest's end, the other end, and the state's name as ss(8) has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            1 => "established",
            2 => "syn-sent",
            3 => "syn-recv",
            4 => "fin-wait-1",
            5 => "fin-wait-2",
            8 => "close-wait",
            9 => "last-ack",
            11 => "closing",
            _ => "unknown",
        };
        write!(f, "{} {} {state}", self.local, self.peer)
    }
}

/// An address in 16 bytes; one of IPv4 in the first four.
fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&ip.octets());
            bytes
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The other way round; `None` for a family that isn't 4 or 6.
pub(crate) fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        4 => bytes.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into()),
        6 => bytes.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into()),
        _ => None,
    }
}

fn frame(kind: u32, payload: Vec<u8>) -> Frame {
    Frame { kind, payload }
}

fn terminated(word: &OsStr) -> impl Iterator<Item = u8> {
    word.as_bytes().iter().copied().chain([0])
}

/// Words, each ended by a NUL; at least one, and the first isn't empty.
fn words(payload: &[u8]) -> Result<Vec<OsString>, WireError> {
    let Some((0, text)) = payload.split_last() else { return Err(strange("command", EXEC, payload)) };
    let words: Vec<OsString> =
        text.split(|&byte| byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    if words[0].is_empty() { Err(strange("command", EXEC, payload)) } else { Ok(words) }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn exact<const N: usize>(kind: u32, payload: &[u8]) -> Result<[u8; N], WireError> {
    payload.try_into().map_err(|_| strange("message", kind, payload))
}

fn strange(what: &str, kind: u32, payload: &[u8]) -> WireError {
    WireError::Unexpected(format!("no {what} is of kind {kind} and has {} bytes", payload.len()))
}

// A command line that doesn't fit is refused by the wire, not cut.
const _: () = assert!(MAX_SEED <= MAX_PAYLOAD && MAX_TEXT + 4 <= MAX_PAYLOAD);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn socket(local: &str, peer: &str) -> TcpSocket {
        TcpSocket { local: local.parse().unwrap(), peer: peer.parse().unwrap(), state: 1 }
    }

    #[test]
    fn what_is_said_is_understood() {
        let requests = [
            Request::Exec(["sh", "-c", "", "\u{fc}"].map(OsString::from).to_vec()),
            Request::Exec(vec![OsString::from_vec(b"\xff".to_vec())]),
            Request::Stdin(vec![]),
            Request::SetClock(Duration::new(1_800_000_000, 123_456_789)),
            Request::Reseed(vec![1; MAX_SEED]),
            Request::ListTcp,
            Request::KillTcp,
        ];
        for request in requests {
            assert_eq!(Request::decode(request.frame()).unwrap(), request);
        }
        let replies = [
            Reply::Hello(1),
            Reply::Stdout(b"out".to_vec()),
            Reply::Stderr(b"err".to_vec()),
            Reply::Exited(7),
            Reply::Signalled(9),
            Reply::Socket(socket("10.0.0.2:22", "10.0.0.1:40000")),
            Reply::Socket(socket("[fe80::2]:22", "[2001:db8::1]:65535")),
            Reply::Done,
            Reply::Failed(Complaint { errno: 2, text: "why".into() }),
        ];
        for reply in replies {
            assert_eq!(Reply::decode(reply.frame()).unwrap(), reply);
        }
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let bad = [
            (EXEC, &b""[..]),
            (EXEC, b"\0"),
            (EXEC, b"ls"),
            (SET_CLOCK, b"1234567"),
            (RESEED, b""),
            (LIST_TCP, b"x"),
            (0, b""),
            (STDOUT, b""),
        ];
        for (kind, payload) in bad {
            assert!(Request::decode(frame(kind, payload.to_vec())).is_err(), "{kind} {payload:?}");
        }
        let mut family = socket("1.2.3.4:5", "6.7.8.9:10").encode();
        family[0] = 5;
        let bad =
            [(HELLO, vec![1]), (EXITED, vec![]), (SOCKET, vec![0; 39]), (SOCKET, family), (FAILED, vec![0])];
        for (kind, payload) in bad {
            assert!(Reply::decode(frame(kind, payload)).is_err(), "{kind}");
        }
    }

    #[test]
    fn a_long_complaint_is_cut() {
        let long = Reply::Failed(Complaint { errno: 1, text: "x".repeat(5000) });
        assert_eq!(long.frame().payload.len(), 4 + MAX_TEXT);
        assert!(Reply::decode(long.frame()).is_ok());
    }

    proptest! {
        #[test]
        fn any_payload_is_decoded_or_refused(kind in 0_u32..30, payload in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Request::decode(frame(kind, payload.clone()));
            let _ = Reply::decode(frame(kind, payload));
        }
    }
}
