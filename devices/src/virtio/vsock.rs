//! The socket device (section 5.10): stream sockets between the guest and the host.
//!
//! In: packets from the guest, streams of the host. Out: the same, the other way. Holds: neither side's slowness or malice costs
//! more than bounded memory, and no connection outlives a restore: the guest is told to drop them all.
//!
//! ```text
//! guest ── tx queue ──► Switch ── bytes ──► host's streams
//!       ◄─ rx queue ──   (connections) ◄──
//!       ◄─ event queue ─ transport reset, after a restore
//! ```

mod connection;
mod host;
mod packet;
mod switch;
#[cfg(test)]
mod testing;
mod unix;

pub use host::{HostEvent, StreamId, VsockHost};
pub use unix::UnixVsock;

use super::{Broken, Chain, Device, Guest};
use crate::Persist;
use connection::BUFFER;
use packet::{HEADER_LEN, Header, op};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use switch::{HOST_PORTS, Switch};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// Most packets of each direction that are moved in one go: other devices share the thread.
const BATCH: usize = 256;
/// The least context ID that a guest can have (section 5.10.4); the highest is below the wildcard of 32 bits.
const CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

/// What survives of a socket device. Connections don't: their other ends are sockets of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context ID, 3 to 2³² - 2.
    pub cid: u64,
    /// The port that the next client of the host gets. It goes on after a restore, so that a guest that has not dropped
    /// its old connections yet doesn't take a new one for one of them.
    pub next_port: u32,
}

impl VsockState {
    /// The device of a machine that was never saved.
    pub fn new(cid: u64) -> Self {
        Self { cid, next_port: HOST_PORTS.start }
    }

    /// Whether a device can have it.
    ///
    /// # Errors
    /// What it can't have.
    pub fn check(&self) -> Result<(), VsockStateError> {
        if !CIDS.contains(&self.cid) {
            return Err(VsockStateError::Cid(self.cid));
        }
        if !HOST_PORTS.contains(&self.next_port) {
            return Err(VsockStateError::Port(self.next_port));
        }
        Ok(())
    }
}

/// A state that no device can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VsockStateError {
    /// Reserved, or too large.
    #[error("context ID {0}: expected {first} to {last}", first = CIDS.start, last = CIDS.end - 1)]
    Cid(u64),
    /// Not one that the device gives out.
    #[error("host port {0}: expected {first} to {last}", first = HOST_PORTS.start, last = HOST_PORTS.end - 1)]
    Port(u32),
}

/// How far the guest is in dropping the connections that a restore has cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// There are none.
    Done,
    /// It is to be told.
    Owed,
    /// It was told, having lent that many buffers for events before. Linux lends that one again when it has dropped them;
    /// a new connection that it heard of before would be dropped too.
    Told { lent: usize },
}

/// A socket device.
pub struct Vsock {
    switch: Switch,
    reset: Reset,
    scratch: Vec<u8>,
}

impl Vsock {
    /// Both directions, until there is nothing to do or others have to have their turn.
    fn work(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.switch.hear_host();
        let more_to_hear = self.hear_guest(guest)?;
        let more_to_tell = self.tell_guest(guest)?;
        if more_to_hear || more_to_tell {
            self.switch.host().wake();
        }
        Ok(())
    }

    /// Returns whether the guest may have more to say.
    fn hear_guest(&mut self, guest: &mut Guest) -> Result<bool, Broken> {
        for _ in 0..BATCH {
            // Its answers come first; the buffers that it lends for them bring us back here.
            if self.switch.is_clogged() {
                self.tell_guest(guest)?;
                if self.switch.is_clogged() {
                    return Ok(false);
                }
            }
            let Some(chain) = guest.pop(TX)? else { return Ok(false) };
            self.hear(&chain, guest)?;
            guest.push(TX, chain.head, 0)?;
        }
        Ok(true)
    }

    fn hear(&mut self, chain: &Chain, guest: &Guest) -> Result<(), Broken> {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read(guest.memory, 0, &mut bytes)? < HEADER_LEN {
            return Err(Broken::new("a packet shorter than its header"));
        }
        let header = Header::from_bytes(&bytes);
        if u64::from(header.len) > chain.readable.len() - HEADER_LEN as u64 {
            return Err(Broken::new(format!("a packet of {} bytes that are not all there", header.len)));
        }
        if header.op != op::RW {
            self.switch.receive(&header, &[]);
        } else if header.len as usize > BUFFER {
            self.switch.receive_too_much(&header);
        } else {
            self.scratch.resize(header.len as usize, 0);
            chain.readable.read(guest.memory, HEADER_LEN as u64, &mut self.scratch)?;
            self.switch.receive(&header, &self.scratch);
        }
        Ok(())
    }

    /// Returns whether there may be more to say, and a buffer to say it in.
    fn tell_guest(&mut self, guest: &mut Guest) -> Result<bool, Broken> {
        for _ in 0..BATCH {
            if !self.switch.has_news() {
                return Ok(false);
            }
            let Some(chain) = guest.pop(RX)? else { return Ok(false) };
            let room = chain.writable.len().saturating_sub(HEADER_LEN as u64);
            if room == 0 {
                return Err(Broken::new("a buffer that has no room for a packet"));
            }
            let Some(header) = self.switch.next(room as usize, &mut self.scratch) else {
                guest.unpop(RX);
                return Ok(false);
            };
            chain.writable.write(guest.memory, 0, &header.to_bytes())?;
            chain.writable.write(guest.memory, HEADER_LEN as u64, &self.scratch)?;
            guest.push(RX, chain.head, HEADER_LEN as u32 + header.len)?;
        }
        Ok(true)
    }

    /// Section 5.10.6.7: the guest drops its connections and keeps its listeners.
    fn tell_of_restore(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        let lent = lent(guest)?;
        let Some(chain) = guest.pop(EVENT)? else { return Ok(()) };
        if chain.writable.write(guest.memory, 0, &TRANSPORT_RESET)? < TRANSPORT_RESET.len() {
            return Err(Broken::new("a buffer that has no room for an event"));
        }
        guest.push(EVENT, chain.head, TRANSPORT_RESET.len() as u32)?;
        self.reset = Reset::Told { lent };
        self.switch.hold(true);
        Ok(())
    }

    fn events_were_lent(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        match self.reset {
            Reset::Done => Ok(()),
            Reset::Owed => self.tell_of_restore(guest),
            Reset::Told { lent: before } if lent(guest)? < before => Ok(()),
            Reset::Told { .. } => {
                self.reset = Reset::Done;
                self.switch.hold(false);
                self.work(guest)
            }
        }
    }
}

/// How many buffers for events the guest has lent. It will notify when it lends one more.
fn lent(guest: &mut Guest) -> Result<usize, Broken> {
    let mut count = 0;
    while count < usize::from(Vsock::QUEUES[EVENT]) && guest.pop(EVENT)?.is_some() {
        count += 1;
    }
    (0..count).for_each(|_| guest.unpop(EVENT));
    Ok(count)
}

impl Device for Vsock {
    const ID: u32 = 19;
    const QUEUES: &'static [u16] = &[256, 256, 64];

    fn config(&self) -> Vec<u8> {
        self.switch.cid().to_le_bytes().to_vec()
    }

    fn reset(&mut self) {
        self.reset = Reset::Done;
        self.switch.clear();
    }

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        if queue == EVENT { self.events_were_lent(guest) } else { self.work(guest) }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.switch.host_fd()
    }

    fn host_ready(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.work(guest)
    }

    fn restored(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.reset = Reset::Owed;
        self.tell_of_restore(guest)
    }
}

impl Persist for Vsock {
    type State = VsockState;
    type Host = Box<dyn VsockHost>;
    type Error = VsockStateError;

    fn save(&self) -> VsockState {
        VsockState { cid: self.switch.cid(), next_port: self.switch.next_port() }
    }

    fn from_state(state: &VsockState, host: Self::Host) -> Result<Self, VsockStateError> {
        state.check()?;
        let switch = Switch::new(state.cid, state.next_port, host);
        Ok(Self { switch, reset: Reset::Done, scratch: Vec::new() })
    }
}

#[cfg(test)]
#[path = "vsock/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "vsock/hostile_tests.rs"]
mod hostile_tests;
