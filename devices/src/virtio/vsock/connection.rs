//! One connection: a stream of the host and a socket of the guest, each with credit at the other.
//!
//! In: packets from the guest, readiness of the stream. Out: packets to the guest, bytes to the stream. Holds: at most
//! [`BUFFER`] bytes are kept for a slow host, and the guest is sent no more than it said it has room for (5.10.6.3).
//!
//! ```text
//! host asks:   Ask ─REQUEST─► Asked ─RESPONSE from the guest─► Open
//! guest asks:  Answer ─RESPONSE─► Open
//! ```

use super::host::{StreamId, VsockHost};
use super::packet::{Header, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, op};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::Shutdown;

/// Bytes kept for a host that does not read, per connection. Linux sends up to 64 KiB in a packet.
pub(super) const BUFFER: usize = 64 << 10;

/// How far the two have come in making a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest is to be asked.
    Ask,
    /// The guest was asked.
    Asked,
    /// The guest asked, and is to be answered.
    Answer,
    /// Bytes flow.
    Open,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The connection goes on.
    Keep,
    /// It is over; the guest is sent a `RST`.
    End,
}

/// A packet's purpose and flags.
pub(super) type Purpose = (u16, u32);

/// The guest's end, as the guest tells of it.
#[derive(Debug, Default)]
struct GuestEnd {
    buf_alloc: u32,
    fwd_cnt: u32,
    /// Bytes sent to it, ever, modulo 2³².
    sent: u32,
    /// What it will not do any more.
    shut: u32,
    /// It was asked for its credit, and has not had any since.
    asked_for_credit: bool,
}

impl GuestEnd {
    fn credit(&self) -> usize {
        self.buf_alloc.saturating_sub(self.sent.wrapping_sub(self.fwd_cnt)) as usize
    }
}

/// The host's end, and what the guest has been told of it.
#[derive(Debug, Default)]
struct HostEnd {
    /// What the guest sent and the stream has not taken yet.
    backlog: VecDeque<u8>,
    /// Bytes that have left the backlog, ever, modulo 2³².
    forwarded: u32,
    told_forwarded: u32,
    readable: bool,
    hung_up: bool,
    /// What the stream will not do any more.
    shut: u32,
    told_shut: u32,
    /// The guest is to be told of its credit in any case.
    owes_credit: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// The host's stream.
    pub(super) stream: StreamId,
    /// Whether it stands in the row of those that may have something to send.
    pub(super) in_row: bool,
    phase: Phase,
    guest: GuestEnd,
    host: HostEnd,
}

impl Connection {
    /// A connection to be made.
    pub(super) fn new(stream: StreamId, phase: Phase) -> Self {
        Self { stream, phase, in_row: false, guest: GuestEnd::default(), host: HostEnd::default() }
    }

    /// How far it is made.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// What the host has not taken yet, for when the connection is over.
    pub(super) fn into_backlog(self) -> VecDeque<u8> {
        self.host.backlog
    }

    /// The guest's word on its credit, which every packet carries.
    pub(super) fn hear_credit(&mut self, header: &Header) {
        (self.guest.buf_alloc, self.guest.fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
        if self.guest.credit() > 0 {
            self.guest.asked_for_credit = false;
        }
    }

    /// A packet from the guest, other than a `RST`. Its credit has been heard.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8], host: &mut dyn VsockHost) -> Verdict {
        match (self.phase, header.op) {
            (Phase::Asked, op::RESPONSE) => {
                host.accepted(self.stream, header.dst_port);
                (self.phase, self.host.readable) = (Phase::Open, true);
                Verdict::Keep
            }
            (Phase::Open, op::RW) => self.take(data, host),
            (Phase::Open, op::SHUTDOWN) => self.guest_shuts(header.flags, host),
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.host.owes_credit = true;
                Verdict::Keep
            }
            _ => Verdict::End,
        }
    }

    fn take(&mut self, data: &[u8], host: &mut dyn VsockHost) -> Verdict {
        if self.guest.shut & SHUT_SEND != 0 || self.host.backlog.len() + data.len() > BUFFER {
            return Verdict::End;
        }
        self.host.backlog.extend(data);
        self.flush(host);
        Verdict::Keep
    }

    fn guest_shuts(&mut self, flags: u32, host: &mut dyn VsockHost) -> Verdict {
        self.guest.shut |= flags & SHUT_BOTH;
        if self.guest.shut == SHUT_BOTH {
            return Verdict::End;
        }
        if self.guest.shut & SHUT_RECEIVE != 0 {
            host.shutdown(self.stream, Shutdown::Read);
        }
        self.flush(host);
        Verdict::Keep
    }

    /// Gives the host what it will take. A host that closed its end swallows the rest.
    pub(super) fn flush(&mut self, host: &mut dyn VsockHost) {
        let before = self.host.backlog.len();
        if !flush(&mut self.host.backlog, self.stream, host) {
            self.host.backlog.clear();
            self.host.shut |= SHUT_RECEIVE;
        }
        let gone = before - self.host.backlog.len();
        self.host.forwarded = self.host.forwarded.wrapping_add(gone as u32);
        if self.host.backlog.is_empty() && self.guest.shut & SHUT_SEND != 0 {
            host.shutdown(self.stream, Shutdown::Write);
        }
    }

    /// The host's stream has moved. `End` for a client that left before the guest answered.
    pub(super) fn stream_is_ready(&mut self, hung_up: bool, host: &mut dyn VsockHost) -> Verdict {
        self.host.hung_up |= hung_up;
        if self.phase != Phase::Open {
            return if hung_up { Verdict::End } else { Verdict::Keep };
        }
        self.host.readable = true;
        if hung_up && self.host.shut & SHUT_SEND != 0 {
            self.host.shut = SHUT_BOTH;
        }
        self.flush(host);
        Verdict::Keep
    }

    /// The next packet to the guest, of at most `room` bytes of `data`; `None` if there is nothing to say now.
    pub(super) fn next(
        &mut self,
        room: usize,
        host: &mut dyn VsockHost,
        data: &mut Vec<u8>,
    ) -> Option<Purpose> {
        match self.phase {
            Phase::Ask => {
                self.phase = Phase::Asked;
                Some((op::REQUEST, 0))
            }
            Phase::Asked => None,
            Phase::Answer => {
                (self.phase, self.host.readable) = (Phase::Open, true);
                Some((op::RESPONSE, 0))
            }
            Phase::Open => self.read(room, host, data).or_else(|| self.shutdown()).or_else(|| self.credit()),
        }
    }

    /// What every packet tells of the host's end.
    pub(super) fn tell_credit(&mut self, header: &mut Header) {
        (header.buf_alloc, header.fwd_cnt) = (BUFFER as u32, self.host.forwarded);
        self.host.told_forwarded = self.host.forwarded;
        self.host.owes_credit = false;
    }

    fn read(&mut self, room: usize, host: &mut dyn VsockHost, data: &mut Vec<u8>) -> Option<Purpose> {
        if !self.host.readable || (self.host.shut & SHUT_SEND) | (self.guest.shut & SHUT_RECEIVE) != 0 {
            return None;
        }
        let most = self.guest.credit().min(room).min(BUFFER);
        if most == 0 {
            let ask = !std::mem::replace(&mut self.guest.asked_for_credit, true);
            return ask.then_some((op::CREDIT_REQUEST, 0));
        }
        data.resize(most, 0);
        let count = match host.read(self.stream, data) {
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.host.readable = false;
                data.clear();
                return None;
            }
            Err(_) => 0,
        };
        data.truncate(count);
        self.guest.sent = self.guest.sent.wrapping_add(count as u32);
        if count == 0 {
            self.host.shut |= if self.host.hung_up { SHUT_BOTH } else { SHUT_SEND };
            return None;
        }
        Some((op::RW, 0))
    }

    fn shutdown(&mut self) -> Option<Purpose> {
        let news = self.host.shut != self.host.told_shut;
        self.host.told_shut = self.host.shut;
        news.then_some((op::SHUTDOWN, self.host.shut))
    }

    /// The guest thinks that it has less than half of its credit, and has more.
    fn credit(&self) -> Option<Purpose> {
        let untold = self.host.forwarded.wrapping_sub(self.host.told_forwarded) as usize;
        (self.host.owes_credit || untold >= BUFFER / 2).then_some((op::CREDIT_UPDATE, 0))
    }
}

/// Writes until the stream would block. Returns whether the stream still takes bytes.
pub(super) fn flush(backlog: &mut VecDeque<u8>, stream: StreamId, host: &mut dyn VsockHost) -> bool {
    while !backlog.is_empty() {
        match host.write(stream, backlog.as_slices().0) {
            Ok(count) if count > 0 => drop(backlog.drain(..count.min(backlog.len()))),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            _ => return false,
        }
    }
    true
}
