//! What a network device receives.
//!
//! In: frames off the wire, buffers that the driver lends. Out: filled buffers. Holds: a driver finds a whole frame or none;
//! while there are no buffers one frame waits here and the rest on the wire, where the oldest stay and the newest are lost.

use super::features::{GUEST_CSUM, HEADER, MRG_RXBUF, NUM_BUFFERS};
use super::{LONGEST, Net, RECEIVE, TURN};
use crate::virtio::{Broken, Chain, Guest};

impl Net {
    pub(super) fn receive(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            if self.waiting.len == 0 && !self.take_frame() {
                return Ok(());
            }
            if !self.deliver(guest)? {
                return Ok(());
            }
        }
        self.wire.again();
        Ok(())
    }

    /// Takes the next frame off the wire. One that is cut short, or has no whole header, is dropped.
    fn take_frame(&mut self) -> bool {
        let Ok(len) = self.wire.receive(&mut self.waiting.room) else { return false };
        if (HEADER..LONGEST).contains(&len) {
            self.waiting.len = len;
            self.mend_header();
        } else {
            self.give_up_frame();
        }
        true
    }

    /// Without `GUEST_CSUM` the flags are zero, and without `MRG_RXBUF` the number of buffers is one (section 5.1.6.4.1).
    fn mend_header(&mut self) {
        if !self.accepted(GUEST_CSUM) {
            self.waiting.room[0] = 0;
        }
        self.waiting.room[NUM_BUFFERS..HEADER].copy_from_slice(&1u16.to_le_bytes());
    }

    fn give_up_frame(&mut self) {
        self.waiting.len = 0;
        self.counters.dropped += 1;
    }

    /// Copies the waiting frame into as many buffers as it needs; `false` if there are too few as yet.
    fn deliver(&mut self, guest: &mut Guest) -> Result<bool, Broken> {
        if self.waiting.len == 0 {
            return Ok(true);
        }
        let most = if self.accepted(MRG_RXBUF) { guest.queue_size(RECEIVE) } else { 1 };
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < self.waiting.len && chains.len() < most {
            let Some(chain) = guest.pop(RECEIVE)? else {
                chains.iter().for_each(|_| guest.unpop(RECEIVE));
                return Ok(false);
            };
            room += receive_room(&chain, chains.is_empty())?;
            chains.push(chain);
        }
        if room < self.waiting.len {
            chains.iter().for_each(|_| guest.unpop(RECEIVE));
            self.give_up_frame();
            return Ok(true);
        }
        self.fill(&chains, guest)?;
        Ok(true)
    }

    fn fill(&mut self, chains: &[Chain], guest: &mut Guest) -> Result<(), Broken> {
        self.waiting.room[NUM_BUFFERS..HEADER].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let (mut used, mut done) = (Vec::with_capacity(chains.len()), 0);
        for chain in chains {
            let written = chain.writable.write(guest.memory, 0, &self.waiting.bytes()[done..])?;
            used.push((chain.head, written as u32));
            done += written;
        }
        self.waiting.len = 0;
        self.counters.received += 1;
        guest.push_together(RECEIVE, &used)
    }
}

/// Bytes that a receive buffer takes. One without room, or whose first bytes don't hold a header, can't have been meant.
fn receive_room(chain: &Chain, first: bool) -> Result<usize, Broken> {
    let room = chain.writable.len() as usize;
    let least = if first { HEADER } else { 1 };
    if room < least { Err(Broken::new(format!("a receive buffer of {room} bytes"))) } else { Ok(room) }
}
