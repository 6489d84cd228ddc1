//! The network device (section 5.1): frames between a guest and a wire.
//!
//! In: frames that the driver lends to be sent, buffers to receive into, commands. Out: frames on the [`Wire`], filled
//! buffers. Holds: a turn is bounded in frames, and what is left gets another; what can't be passed on is dropped and counted.
//!
//! ```text
//! driver ── queue 1: header, frame ──► may_send ──► Wire::send
//!        ◄─ queue 0: header, frame ── one or more buffers ◄── Wire::receive
//!        ── queue 2: command ──► announced, offloads
//! ```

mod features;
mod mac;
mod receive;

pub use features::Offloads;
pub use mac::{Mac, MacError};

use super::{Broken, Device, Guest};
use crate::Persist;
use features::{CTRL_GUEST_OFFLOADS, GUEST_ANNOUNCE, HEADER, MTU, OFFERED, RECEIVING, may_send};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;

/// Frames of each direction, and commands, in one turn: others' devices wait on the same thread.
const TURN: usize = 64;
/// Longest header and frame: 64 KiB of segments with all their headers.
const LONGEST: usize = 68 << 10;
/// The least MTU (section 5.1.4.1).
const LEAST_MTU: u16 = 68;

/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`.
const ANNOUNCE: u16 = 2;

/// The other end of the cable: takes and gives frames, each with a 12-byte `struct virtio_net_hdr` in front.
pub trait Wire: Send {
    /// Becomes readable when there are frames, or room again after [`Self::send`] had none, or after [`Self::again`].
    fn fd(&self) -> BorrowedFd<'_>;
    /// The events that made the descriptor readable are being seen to.
    fn seen(&mut self);
    /// Makes the descriptor readable: there is work left for another turn.
    fn again(&mut self);
    /// Takes the next frame, and returns how many bytes it has.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize>;
    /// Sends a frame.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room for it now; others if it can't be sent.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
    /// What received frames may leave to the guest from now on.
    ///
    /// # Errors
    /// What the host said.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}

/// What survives of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its address.
    pub mac: Mac,
    /// The longest packet its network takes, in bytes, if the driver is to know.
    pub mtu: Option<u16>,
    /// Whether the driver has yet to announce itself.
    pub announce: bool,
    /// What it has chosen of the receiving features that it accepted; none: all of them.
    pub offloads: Option<u64>,
}

/// Why a state was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetStateError {
    /// No interface's address.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// No network's MTU.
    #[error("an MTU of {0}: expected 68 to 65535")]
    Mtu(u16),
    /// Offloads that were not offered.
    #[error("receiving offloads {0:#x} that are not offered")]
    Offloads(u64),
}

/// What has passed since the device was made in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that the guest received.
    pub received: u64,
    /// Frames that it sent.
    pub sent: u64,
    /// Frames in either direction that could not be passed on.
    pub dropped: u64,
}

/// Room for the longest frame, and how much of it is in use.
struct Frame {
    room: Vec<u8>,
    len: usize,
}

impl Frame {
    fn new() -> Self {
        Self { room: vec![0; LONGEST], len: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }
}

/// A network device.
pub struct Net {
    state: NetState,
    /// Those that the driver accepted; none while there is no driver.
    features: u64,
    /// A frame that was received and has found no buffers yet; none if it has no bytes.
    waiting: Frame,
    /// A frame on its way out.
    outgoing: Frame,
    counters: Counters,
    wire: Box<dyn Wire>,
}

impl Net {
    /// What has passed.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Its address.
    pub fn mac(&self) -> Mac {
        self.state.mac
    }

    fn accepted(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn transmit(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(TRANSMIT)? else { return Ok(()) };
            self.outgoing.len = chain.readable.read(guest.memory, 0, &mut self.outgoing.room)?;
            match self.send() {
                Ok(()) => self.counters.sent += 1,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    guest.unpop(TRANSMIT);
                    return Ok(());
                }
                Err(_) => self.counters.dropped += 1,
            }
            guest.push(TRANSMIT, chain.head, 0)?;
        }
        self.wire.again();
        Ok(())
    }

    /// A frame as long as its room may have been cut short.
    fn send(&mut self) -> io::Result<()> {
        let frame = self.outgoing.bytes();
        let whole = frame.len() > HEADER && frame.len() < LONGEST;
        if !whole || !may_send(&frame[..HEADER], self.features) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.wire.send(frame)
    }

    /// Commands (section 5.1.6.5): a class, a command and its data to read, a byte to answer in.
    fn commands(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(CONTROL)? else { return Ok(()) };
            let mut command = [0; 10];
            let len = chain.readable.read(guest.memory, 0, &mut command)?;
            let whole = len as u64 == chain.readable.len();
            let refused = u8::from(!whole || !self.command(&command[..len]));
            let written = chain.writable.write(guest.memory, 0, &[refused])?;
            guest.push(CONTROL, chain.head, written as u32)?;
        }
        self.wire.again();
        Ok(())
    }

    /// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`, and `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`.
    fn command(&mut self, command: &[u8]) -> bool {
        match *command {
            [3, 0] if self.accepted(GUEST_ANNOUNCE) => {
                self.state.announce = false;
                true
            }
            [5, 0, ref offloads @ ..] if self.accepted(CTRL_GUEST_OFFLOADS) => {
                let offloads = offloads.try_into().map(u64::from_le_bytes);
                offloads.is_ok_and(|offloads| self.choose_offloads(offloads))
            }
            _ => false,
        }
    }

    fn choose_offloads(&mut self, offloads: u64) -> bool {
        let offered = offloads & !(self.features & RECEIVING) == 0;
        offered && self.wire.set_offloads(Offloads::from_features(offloads)).is_ok() && {
            self.state.offloads = Some(offloads);
            true
        }
    }
}

impl Device for Net {
    const ID: u32 = 1;
    const QUEUES: &'static [u16] = &[256, 256, 64];

    fn features(&self) -> u64 {
        OFFERED | if self.state.mtu.is_some() { MTU } else { 0 }
    }

    /// `struct virtio_net_config` (section 5.1.4): address, status, one pair of queues, MTU.
    fn config(&self) -> Vec<u8> {
        let status = LINK_UP | if self.state.announce { ANNOUNCE } else { 0 };
        let mut config = self.state.mac.0.to_vec();
        for field in [status, 1, self.state.mtu.unwrap_or(0)] {
            config.extend(field.to_le_bytes());
        }
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        let offloads = self.state.offloads.unwrap_or(features) & features;
        // A wire takes every combination, or could not have been had.
        let _ = self.wire.set_offloads(Offloads::from_features(offloads));
        // What came before there was a driver is told no more.
        self.wire.again();
    }

    fn reset(&mut self) {
        self.features = 0;
        self.waiting.len = 0;
        self.state.announce = false;
        self.state.offloads = None;
        let _ = self.wire.set_offloads(Offloads::default());
    }

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        match queue {
            RECEIVE => self.receive(guest),
            TRANSMIT => self.transmit(guest),
            _ => self.commands(guest),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wire.fd())
    }

    fn host_ready(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.wire.seen();
        self.commands(guest)?;
        self.transmit(guest)?;
        self.receive(guest)
    }

    /// Neighbours have to learn where the guest is now: the driver is asked to tell them (section 5.1.4.2).
    fn restored(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        if self.accepted(GUEST_ANNOUNCE) {
            self.state.announce = true;
            guest.change_config();
        }
        Ok(())
    }
}

impl Persist for Net {
    type State = NetState;
    type Host = Box<dyn Wire>;
    type Error = NetStateError;

    fn save(&self) -> NetState {
        self.state.clone()
    }

    fn from_state(state: &NetState, wire: Self::Host) -> Result<Self, NetStateError> {
        state.mac.checked()?;
        if let Some(mtu) = state.mtu.filter(|&mtu| mtu < LEAST_MTU) {
            return Err(NetStateError::Mtu(mtu));
        }
        let unknown = state.offloads.unwrap_or(0) & !RECEIVING;
        if unknown != 0 {
            return Err(NetStateError::Offloads(unknown));
        }
        let (state, counters) = (state.clone(), Counters::default());
        let (waiting, outgoing) = (Frame::new(), Frame::new());
        Ok(Self { state, features: 0, waiting, outgoing, counters, wire })
    }
}

#[cfg(test)]
mod tests;
