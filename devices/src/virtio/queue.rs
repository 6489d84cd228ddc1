//! One virtqueue: buffers that a driver lends, checked.
//!
//! In: rings and descriptors in guest memory, all of them hostile. Out: [`Chain`]s whose every segment lies in guest RAM.
//! Holds: what is taken is bounded by the queue's size, and what is malformed is [`Broken`], never half a buffer.

use crate::Memory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_queue::{self as vq, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// A rule that a driver broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

impl Broken {
    /// With what it did.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// Most descriptors of one buffer. A queue may have fewer; tables of indirect descriptors may exceed a queue's size, which
/// the specification forbids (2.7.5.3.1) and Linux does.
const CHAIN_MAX: usize = 1024;

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// Pieces of guest RAM that follow each other as one run of bytes. None of a driver's is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segments(Vec<Segment>);

/// A buffer that a driver lent: first what the device may read, then what it may write.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// What the buffer is called when it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Segments,
    /// What the device may write.
    pub writable: Segments,
}

impl Segments {
    /// Most pieces of one buffer.
    pub const MAX: usize = CHAIN_MAX;

    /// The pieces.
    pub fn as_slice(&self) -> &[Segment] {
        &self.0
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces of the `len` bytes from `offset`, or of as many as there are.
    pub fn slice(&self, offset: u64, len: u64) -> Segments {
        let (mut skip, mut left) = (offset, len);
        let mut pieces = Vec::new();
        for segment in &self.0 {
            let before = skip.min(u64::from(segment.len));
            let take = (u64::from(segment.len) - before).min(left);
            skip -= before;
            left -= take;
            if take > 0 {
                pieces.push(Segment { address: segment.address + before, len: take as u32 });
            }
        }
        Segments(pieces)
    }

    /// Copies bytes from `offset` on into `buf`, and returns how many there were.
    ///
    /// # Errors
    /// A piece outside guest RAM.
    pub fn read(&self, memory: &Memory, offset: u64, buf: &mut [u8]) -> Result<usize, Broken> {
        let mut done = 0;
        for piece in self.slice(offset, buf.len() as u64).0 {
            let part = &mut buf[done..done + piece.len as usize];
            memory.read_slice(part, GuestAddress(piece.address)).map_err(outside)?;
            done += part.len();
        }
        Ok(done)
    }

    /// Copies `bytes` to `offset` and on, and returns how many there was room for.
    ///
    /// # Errors
    /// A piece outside guest RAM.
    pub fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<usize, Broken> {
        let mut done = 0;
        for piece in self.slice(offset, bytes.len() as u64).0 {
            let part = &bytes[done..done + piece.len as usize];
            memory.write_slice(part, GuestAddress(piece.address)).map_err(outside)?;
            done += part.len();
        }
        Ok(done)
    }

    /// Whether every piece has bytes and lies in guest RAM: for those that come from a snapshot.
    pub fn are_in(&self, memory: &Memory) -> bool {
        let is_in = |piece: &Segment| {
            piece.len > 0 && memory.check_range(GuestAddress(piece.address), piece.len as usize)
        };
        self.0.iter().all(is_in)
    }
}

/// What survives of a queue: its place, its size, and how far each side got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries, as the driver chose.
    pub size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// The next entry to take from the available ring.
    pub next_avail: u16,
    /// The next entry to write in the used ring.
    pub next_used: u16,
}

/// A virtqueue in use.
#[derive(Debug)]
pub struct Queue {
    inner: vq::Queue,
    /// Buffers given back since the driver's wish for an interrupt was last looked at.
    pushed: u16,
}

impl Queue {
    /// A queue as a driver set it up, or left alone; `event_idx` says whether `VIRTIO_F_EVENT_IDX` was accepted.
    ///
    /// # Errors
    /// A size, an alignment, or a place outside guest RAM that no queue can have.
    pub fn from_state(
        state: &QueueState,
        max_size: u16,
        event_idx: bool,
        memory: &Memory,
    ) -> Result<Self, Broken> {
        let inner = vq::Queue::try_from(vq::QueueState {
            max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        })
        .map_err(|e| Broken::new(e.to_string()))?;
        if state.ready && !inner.is_valid(memory) {
            return Err(Broken::new("a queue outside guest RAM"));
        }
        Ok(Self { inner, pushed: 0 })
    }

    /// How far both sides got.
    pub fn progress(&self) -> (u16, u16) {
        (self.inner.next_avail(), self.inner.next_used())
    }

    /// The next buffer. When there is none, the driver is asked to notify for the next.
    pub(super) fn pop(&mut self, memory: &Memory) -> Result<Option<Chain>, Broken> {
        if !self.inner.ready() {
            return Ok(None);
        }
        let available = self.inner.iter(memory).map_err(broken)?.next();
        let chain = match available {
            Some(chain) => Some(chain),
            None if self.inner.enable_notification(memory).map_err(broken)? => {
                self.inner.iter(memory).map_err(broken)?.next()
            }
            None => None,
        };
        chain.map(|chain| checked(chain, usize::from(self.inner.size()), memory)).transpose()
    }

    pub(super) fn unpop(&mut self) {
        self.inner.go_to_previous_position();
    }

    /// Entries.
    pub(super) fn size(&self) -> u16 {
        self.inner.size()
    }

    /// Gives buffers back as one: the driver finds all of them or none. (virtio-queue would show it one after another.)
    pub(super) fn push(&mut self, memory: &Memory, used: &[(u16, u32)]) -> Result<(), Broken> {
        let (size, mut next) = (self.inner.size(), self.inner.next_used());
        for &(head, len) in used {
            if head >= size {
                return Err(Broken::new(format!("buffer {head} of a queue with {size} entries")));
            }
            let entry = 4 + 8 * u64::from(next % size);
            let at = self.in_ring(self.inner.used_ring(), entry)?;
            memory.write_obj(u64::from(head).to_le() | u64::from(len).to_le() << 32, at).map_err(outside)?;
            next = next.wrapping_add(1);
        }
        self.inner.set_next_used(next);
        self.pushed = self.pushed.saturating_add(used.len() as u16);
        let index = self.in_ring(self.inner.used_ring(), 2)?;
        memory.store(next.to_le(), index, Ordering::Release).map_err(outside)
    }

    /// Whether the driver wants an interrupt for what was given back since the last time (sections 2.7.7 and 2.7.10).
    pub(super) fn wants_interrupt(&mut self, memory: &Memory) -> Result<bool, Broken> {
        let pushed = std::mem::take(&mut self.pushed);
        if pushed == 0 {
            return Ok(false);
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        let event_idx = self.inner.event_idx_enabled();
        let field = if event_idx { 4 + 2 * u64::from(self.inner.size()) } else { 0 };
        let at = self.in_ring(self.inner.avail_ring(), field)?;
        let wish = u16::from_le(memory.load(at, Ordering::Relaxed).map_err(outside)?);
        Ok(match event_idx {
            true => self.inner.next_used().wrapping_sub(wish).wrapping_sub(1) < pushed,
            false => wish & 1 == 0,
        })
    }

    fn in_ring(&self, ring: u64, offset: u64) -> Result<GuestAddress, Broken> {
        ring.checked_add(offset).map(GuestAddress).ok_or_else(|| Broken::new("a ring outside RAM"))
    }
}

fn outside(error: vm_memory::GuestMemoryError) -> Broken {
    Broken::new(error.to_string())
}

fn broken(error: vq::Error) -> Broken {
    Broken::new(error.to_string())
}

/// virtio-queue ends a chain where it becomes malformed. Only one whose last descriptor names no next is whole.
fn checked(chain: vq::DescriptorChain<&Memory>, queue_size: usize, memory: &Memory) -> Result<Chain, Broken> {
    let head = chain.head_index();
    let mut whole = Chain { head, ..Chain::default() };
    let mut more = true;
    for (count, descriptor) in chain.enumerate() {
        if count >= queue_size.max(CHAIN_MAX) {
            return Err(Broken::new("a buffer of more descriptors than its queue has"));
        }
        let segment = Segment { address: descriptor.addr().0, len: descriptor.len() };
        if !memory.check_range(descriptor.addr(), segment.len as usize) {
            return Err(Broken::new(format!(
                "a descriptor of {:#x} bytes at {:#x}, outside RAM",
                segment.len, segment.address
            )));
        }
        more = descriptor.has_next();
        // No bytes lie nowhere: the check of the range lets any address through.
        if segment.len == 0 {
            continue;
        }
        match descriptor.is_write_only() {
            true => whole.writable.0.push(segment),
            false if whole.writable.0.is_empty() => whole.readable.0.push(segment),
            false => return Err(Broken::new("a descriptor to read after one to write")),
        }
    }
    if more { Err(Broken::new("a chain of descriptors without end")) } else { Ok(whole) }
}
