//! The block device (section 5.2): one request queue over a disk of the host.
//!
//! In: requests of a driver, completions of the disk. Out: operations for the disk, a status for each request. Holds: what
//! goes to the disk lies within it and in guest RAM, and a request is in the state from when it is taken until it is answered.
//!
//! A request that the disk has not finished when the machine is saved is saved with it, and begun anew by a restore. It may
//! have been done in part or in whole; doing it again changes nothing, because the driver hasn't been told that it is done,
//! and so has asked for nothing that depends on it. For the same reason those that are under way together may be done in
//! any order: a flush speaks of those that were done before it was asked for (section 5.2.6.1).

use super::disk::{Completion, DiskEngine, Operation, SECTOR};
use super::{Broken, Chain, Device, Guest, Segments, TURN};
use crate::Memory;
use crate::Persist;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Entries of the queue, and so the most requests under way.
const QUEUE: u16 = 256;
/// Most pieces of data in a request: those of the longest chain without header and status.
const SEGMENTS_MAX: u32 = QUEUE as u32 - 2;
/// Most sectors that one request discards or zeroes: 1 GiB.
const ZERO_MAX: u32 = 1 << 21;
/// Sectors in 4 KiB, in which file systems give space back.
const DISCARD_ALIGNMENT: u32 = 8;
/// Bytes of a serial number (section 5.2.6.1, `VIRTIO_BLK_T_GET_ID`).
pub const SERIAL_MAX: usize = 20;

const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// Bytes of a request's header, and of a range to be discarded or zeroed.
const HEADER: u64 = 16;
const UNMAP: u32 = 1;

/// What a driver is told of its request (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// What survives of a block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Bytes of the disk.
    pub size: u64,
    /// Whether the driver may not write.
    pub read_only: bool,
    /// The disk's serial number: at most [`SERIAL_MAX`] bytes.
    pub serial: String,
    /// What the disk has not finished.
    pub unfinished: Vec<Request>,
}

/// A request that is with the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What its buffer is called.
    pub head: u16,
    /// Guest physical address of the status byte.
    pub status: u64,
    /// Bytes of guest RAM written once it is done, the status byte among them.
    pub written: u32,
    /// What the disk has been asked.
    pub operation: Operation,
}

/// Why a state was refused.
#[derive(Debug, thiserror::Error)]
pub enum BlkStateError {
    /// The disk is another one.
    #[error("the disk has {disk} bytes, and the machine one of {state}")]
    Size {
        /// Bytes of the host's.
        disk: u64,
        /// Bytes that the guest knows.
        state: u64,
    },
    /// No such disk can be.
    #[error("a disk of {0} bytes: expected a multiple of {SECTOR}")]
    Sectors(u64),
    /// A serial number that doesn't fit.
    #[error("a serial number of {0} bytes: expected at most {SERIAL_MAX}")]
    Serial(usize),
    /// No driver can have so many under way.
    #[error("{0} unfinished requests: expected at most {QUEUE}")]
    TooMany(usize),
    /// A request that would not have been taken.
    #[error("unfinished request {0}: not within the disk, or not in guest RAM")]
    Request(usize),
}

/// What a block device needs of the host.
pub struct BlkHost {
    /// The disk.
    pub engine: Box<dyn DiskEngine>,
    /// Guest RAM, in which the requests of a restored device have to lie.
    pub memory: Memory,
}

/// A block device.
pub struct Blk {
    state: BlkState,
    /// The place in the list is the token. What a restore brought is there before it is submitted.
    slots: Vec<Option<Slot>>,
    features: u64,
    engine: Box<dyn DiskEngine>,
}

struct Slot {
    request: Request,
    submitted: bool,
}

/// What becomes of a request.
enum Parsed {
    Ask(Operation),
    Answer(Status, u32),
}

impl Blk {
    /// How many requests are with the disk.
    fn under_way(&self) -> usize {
        self.slots.iter().flatten().filter(|slot| slot.submitted).count()
    }

    fn take(&mut self, chain: &Chain, guest: &mut Guest) -> Result<(), Broken> {
        let Some(room) = chain.writable.len().checked_sub(1) else {
            return Err(Broken::new("a request without room for its status"));
        };
        let mut header = [0; HEADER as usize];
        if chain.readable.read(guest.memory, 0, &mut header)? < header.len() {
            return Err(Broken::new("a request without a whole header"));
        }
        let parsed = self.parse(&header, chain, room, guest.memory)?;
        let status = chain.writable.slice(room, 1).as_slice().first().map_or(0, |piece| piece.address);
        match parsed {
            Parsed::Ask(operation) => {
                let written = match &operation {
                    Operation::Read { into, .. } => u32::try_from(into.len() + 1).unwrap_or(u32::MAX),
                    _ => 1,
                };
                self.submit(Request { head: chain.head, status, written, operation })
            }
            Parsed::Answer(answer, data) => answer_with(guest, chain.head, status, answer, data + 1),
        }
    }

    fn parse(
        &self,
        header: &[u8; HEADER as usize],
        chain: &Chain,
        room: u64,
        memory: &Memory,
    ) -> Result<Parsed, Broken> {
        let (kind, sector) = (le32(&header[0..]), le64(&header[8..]));
        let data = chain.readable.slice(HEADER, u64::MAX);
        let parsed = match kind {
            T_IN => {
                Parsed::of(sector, |offset| Operation::Read { offset, into: chain.writable.slice(0, room) })
            }
            T_OUT => Parsed::of(sector, |offset| Operation::Write { offset, from: data }),
            T_FLUSH if self.state.read_only => Parsed::Answer(Status::Ok, 0),
            T_FLUSH => Parsed::Ask(Operation::Flush),
            T_GET_ID => self.identify(chain, room, memory)?,
            T_DISCARD if self.features & DISCARD != 0 => zeroes(&data, memory, false)?,
            T_WRITE_ZEROES if self.features & WRITE_ZEROES != 0 => zeroes(&data, memory, true)?,
            _ => Parsed::Answer(Status::Unsupported, 0),
        };
        Ok(match parsed {
            Parsed::Ask(operation) if !self.allows(&operation) => Parsed::Answer(Status::IoErr, 0),
            parsed => parsed,
        })
    }

    /// Whether the disk has such bytes, and they may be written if that is what is asked.
    fn allows(&self, operation: &Operation) -> bool {
        let within = operation.range().is_none_or(|(offset, len)| {
            let end = offset.checked_add(len).is_some_and(|end| end <= self.state.size);
            end && offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR)
        });
        within && !(self.state.read_only && operation.writes())
    }

    fn identify(&self, chain: &Chain, room: u64, memory: &Memory) -> Result<Parsed, Broken> {
        let mut id = [0; SERIAL_MAX];
        let serial = self.state.serial.as_bytes();
        id[..serial.len()].copy_from_slice(serial);
        let written = chain.writable.slice(0, room).write(memory, 0, &id)?;
        Ok(Parsed::Answer(Status::Ok, written as u32))
    }

    fn submit(&mut self, request: Request) -> Result<(), Broken> {
        let free = self.slots.iter().position(Option::is_none);
        let token = free.ok_or_else(|| Broken::new("more requests than the queue has entries"))?;
        self.engine.submit(token as u16, &request.operation);
        self.slots[token] = Some(Slot { request, submitted: true });
        Ok(())
    }

    /// Every request that is done is taken off the list, even when the driver can't be told of one: a reset waits for those
    /// that are on it.
    fn complete(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        let mut told = Ok(());
        for Completion { token, result } in self.engine.completed() {
            let slot = self.slots.get_mut(usize::from(token));
            if let Some(slot) = slot.and_then(|slot| slot.take_if(|slot| slot.submitted)) {
                told = told.and(self.finish(slot.request, result, guest));
            }
        }
        told
    }

    fn finish(&mut self, request: Request, result: io::Result<()>, guest: &mut Guest) -> Result<(), Broken> {
        let Request { head, status, written, operation } = request;
        match result {
            // A driver that knows of no flush takes each write for durable (section 5.2.5.1).
            Ok(()) if operation.writes() && self.features & FLUSH == 0 => {
                self.submit(Request { head, status, written, operation: Operation::Flush })?;
                self.engine.start();
                Ok(())
            }
            Ok(()) => answer_with(guest, head, status, Status::Ok, written),
            Err(_) => answer_with(guest, head, status, Status::IoErr, 1),
        }
    }

    fn take_all(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = guest.pop(queue)? else { return Ok(()) };
            self.take(&chain, guest)?;
        }
        guest.again(queue);
        Ok(())
    }
}

impl Parsed {
    fn of(sector: u64, operation: impl FnOnce(u64) -> Operation) -> Self {
        match sector.checked_mul(SECTOR) {
            Some(offset) => Self::Ask(operation(offset)),
            None => Self::Answer(Status::IoErr, 0),
        }
    }
}

/// One range, because that is what the configuration allows (section 5.2.6.2).
fn zeroes(data: &Segments, memory: &Memory, write: bool) -> Result<Parsed, Broken> {
    let mut range = [0; HEADER as usize];
    if data.len() != HEADER || data.read(memory, 0, &mut range)? < range.len() {
        return Ok(Parsed::Answer(Status::IoErr, 0));
    }
    let (sector, count, flags) = (le64(&range[0..]), le32(&range[8..]), le32(&range[12..]));
    let known = if write { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Ok(Parsed::Answer(Status::Unsupported, 0));
    }
    if count > ZERO_MAX {
        return Ok(Parsed::Answer(Status::IoErr, 0));
    }
    let (len, unmap) = (u64::from(count) * SECTOR, flags & UNMAP != 0);
    Ok(Parsed::of(sector, |offset| match write {
        true => Operation::WriteZeroes { offset, len, unmap },
        false => Operation::Discard { offset, len },
    }))
}

fn answer_with(guest: &mut Guest, head: u16, at: u64, status: Status, written: u32) -> Result<(), Broken> {
    let told = guest.memory.write_obj(status as u8, GuestAddress(at));
    told.map_err(|error| Broken::new(error.to_string()))?;
    guest.push(0, head, written)
}

impl Device for Blk {
    const ID: u32 = 2;
    const QUEUES: &'static [u16] = &[QUEUE];

    fn features(&self) -> u64 {
        SEG_MAX | BLK_SIZE | if self.state.read_only { RO } else { FLUSH | DISCARD | WRITE_ZEROES }
    }

    /// `struct virtio_blk_config` (section 5.2.4), as far as the features reach.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.state.size / SECTOR).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(36, &ZERO_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &ZERO_MAX.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    /// Waits for the disk, however long it takes: nothing else keeps its hands off guest memory that the driver is about
    /// to use for something else.
    fn reset(&mut self) {
        while self.under_way() > 0 {
            let _ = wait(self.engine.event(), None);
            for Completion { token, .. } in self.engine.completed() {
                if let Some(slot) = self.slots.get_mut(usize::from(token)) {
                    *slot = None;
                }
            }
        }
        self.slots.iter_mut().for_each(|slot| *slot = None);
        self.features = 0;
    }

    fn notified(&mut self, queue: usize, guest: &mut Guest) -> Result<(), Broken> {
        let taken = self.take_all(queue, guest);
        // After a rule broken too: a reset waits for what was taken in before.
        self.engine.start();
        taken
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.engine.event())
    }

    fn host_ready(&mut self, guest: &mut Guest) -> Result<(), Broken> {
        self.complete(guest)
    }

    fn drain(&mut self, deadline: Instant, guest: &mut Guest) -> Result<(), Broken> {
        // What is done is done, even if other disks have taken all the time there was.
        self.complete(guest)?;
        while self.under_way() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || wait(self.engine.event(), Some(left)).is_err() {
                break;
            }
            self.complete(guest)?;
        }
        Ok(())
    }

    fn restored(&mut self, _guest: &mut Guest) -> Result<(), Broken> {
        for (token, slot) in (0..).zip(&mut self.slots) {
            if let Some(slot) = slot.as_mut().filter(|slot| !slot.submitted) {
                self.engine.submit(token, &slot.request.operation);
                slot.submitted = true;
            }
        }
        self.engine.start();
        Ok(())
    }
}

/// Until the descriptor is readable, or for so long. An interruption by a signal counts as an end too.
fn wait(event: BorrowedFd, limit: Option<Duration>) -> rustix::io::Result<()> {
    let limit =
        limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
    match poll(&mut [PollFd::from_borrowed_fd(event, PollFlags::IN)], limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

impl Persist for Blk {
    type State = BlkState;
    type Host = BlkHost;
    type Error = BlkStateError;

    fn save(&self) -> BlkState {
        let unfinished = self.slots.iter().flatten().map(|slot| slot.request.clone()).collect();
        BlkState { unfinished, ..self.state.clone() }
    }

    fn from_state(state: &BlkState, host: BlkHost) -> Result<Self, BlkStateError> {
        let BlkState { size, serial, unfinished, .. } = state;
        if host.engine.size() != *size {
            return Err(BlkStateError::Size { disk: host.engine.size(), state: *size });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(BlkStateError::Sectors(*size));
        }
        if serial.len() > SERIAL_MAX {
            return Err(BlkStateError::Serial(serial.len()));
        }
        if unfinished.len() > usize::from(QUEUE) {
            return Err(BlkStateError::TooMany(unfinished.len()));
        }
        let slot = |request: &Request| Some(Slot { request: request.clone(), submitted: false });
        let mut slots: Vec<_> = unfinished.iter().map(slot).collect();
        slots.resize_with(usize::from(QUEUE), || None);
        let state = BlkState { unfinished: Vec::new(), ..state.clone() };
        let blk = Self { state, slots, features: 0, engine: host.engine };
        match unfinished.iter().position(|request| !blk.could_have_taken(request, &host.memory)) {
            Some(bad) => Err(BlkStateError::Request(bad)),
            None => Ok(blk),
        }
    }
}

impl Blk {
    fn could_have_taken(&self, request: &Request, memory: &Memory) -> bool {
        let in_ram = match &request.operation {
            Operation::Read { into: segments, .. } | Operation::Write { from: segments, .. } => {
                segments.are_in(memory) && segments.as_slice().len() <= Segments::MAX
            }
            _ => true,
        };
        let head = request.head < QUEUE;
        in_ram
            && head
            && self.allows(&request.operation)
            && memory.check_range(GuestAddress(request.status), 1)
    }
}

fn le32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn le64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
