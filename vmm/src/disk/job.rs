//! A disk operation as the host's system calls take it.
//!
//! In: an [`Operation`] on guest RAM. Out: vectors of host addresses, and what to do next after a call that did a part. Holds:
//! guest RAM stays mapped for as long as a job names its addresses, and what a read has filled is marked as written.

use devices::Memory;
use devices::virtio::{Operation, Segments};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Most vectors of one call (`IOV_MAX`).
const VECTORS_MAX: usize = 1024;
/// Zeroes that are written where a file system has no other way.
const ZEROES: usize = 1 << 20;

/// What is to be done under a token.
pub(super) struct Job {
    pub(super) token: u16,
    pub(super) work: Work,
}

/// One of the three kinds of calls.
pub(super) enum Work {
    /// `preadv` or `pwritev`.
    Transfer(Transfer),
    /// `fdatasync`.
    Sync,
    /// `fallocate`, which may need a substitute: [`Operation::Discard`] or [`Operation::WriteZeroes`].
    Space(Operation),
}

/// Bytes between a file and guest RAM.
pub(super) struct Transfer {
    pub(super) write: bool,
    /// In the file.
    pub(super) offset: u64,
    vectors: Vec<libc::iovec>,
    /// The first that is not done.
    next: usize,
    segments: Segments,
    memory: Memory,
}

// SAFETY: the vectors' pointers are into `memory`, which is shared between threads anyway and stays mapped as long as the
// value lives; only system calls follow them.
unsafe impl Send for Transfer {}

impl Job {
    /// # Errors
    /// Bytes outside guest RAM.
    pub(super) fn new(token: u16, operation: &Operation, memory: &Memory) -> io::Result<Self> {
        let work = match operation {
            Operation::Read { offset, into } => Work::Transfer(Transfer::new(false, *offset, into, memory)?),
            Operation::Write { offset, from } => Work::Transfer(Transfer::new(true, *offset, from, memory)?),
            Operation::Flush => Work::Sync,
            space => Work::Space(space.clone()),
        };
        Ok(Self { token, work })
    }

    /// Does all of it, and waits for it.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn run(&mut self, file: &File) -> io::Result<()> {
        match &mut self.work {
            Work::Transfer(transfer) => transfer.run(file),
            Work::Sync => file.sync_data(),
            Work::Space(Operation::Discard { offset, len }) => match punch(file, *offset, *len) {
                Err(error) if has_no_such_call(&error) => Ok(()),
                done => done,
            },
            Work::Space(Operation::WriteZeroes { offset, len, unmap }) => zero(file, *offset, *len, *unmap),
            Work::Space(_) => Ok(()),
        }
    }
}

impl Transfer {
    fn new(write: bool, offset: u64, segments: &Segments, memory: &Memory) -> io::Result<Self> {
        let mut vectors = Vec::new();
        for piece in segments.as_slice() {
            for slice in memory.get_slices(GuestAddress(piece.address), piece.len as usize) {
                let slice = slice.map_err(io::Error::other)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                vectors.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        let (segments, memory) = (segments.clone(), memory.clone());
        let mut transfer = Self { write, offset, vectors, next: 0, segments, memory };
        transfer.skip_empty();
        Ok(transfer)
    }

    /// What the next call takes.
    pub(super) fn vectors(&self) -> &[libc::iovec] {
        let rest = &self.vectors[self.next..];
        &rest[..rest.len().min(VECTORS_MAX)]
    }

    /// Whether nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.next == self.vectors.len()
    }

    /// A call moved so many bytes.
    ///
    /// # Errors
    /// None, though there were bytes to move: the file is shorter than it was.
    pub(super) fn advance(&mut self, count: usize) -> io::Result<()> {
        if count == 0 && !self.is_done() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the disk was shortened"));
        }
        self.offset += count as u64;
        let mut left = count;
        while let Some(vector) = self.vectors.get_mut(self.next).filter(|_| left > 0) {
            let part = left.min(vector.iov_len);
            vector.iov_base = vector.iov_base.wrapping_byte_add(part);
            vector.iov_len -= part;
            left -= part;
            self.skip_empty();
        }
        Ok(())
    }

    /// Bytes that are left to do.
    pub(super) fn left(&self) -> u64 {
        self.vectors[self.next..].iter().map(|vector| vector.iov_len as u64).sum()
    }

    fn skip_empty(&mut self) {
        while self.vectors.get(self.next).is_some_and(|vector| vector.iov_len == 0) {
            self.next += 1;
        }
    }

    /// KVM's dirty log does not see what the kernel writes for us.
    fn mark_written(&self) {
        for piece in self.segments.as_slice().iter().filter(|_| !self.write) {
            let slices = self.memory.get_slices(GuestAddress(piece.address), piece.len as usize);
            slices.flatten().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        }
    }

    pub(super) fn run(&mut self, file: &File) -> io::Result<()> {
        self.run_for(file, u64::MAX)
    }

    /// Does so many bytes of it, or what is left if that is less.
    pub(super) fn run_for(&mut self, file: &File, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 && !self.is_done() {
            let moved = self.call(file, bytes);
            if moved < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            self.advance(moved as usize)?;
            bytes -= moved as u64;
        }
        Ok(())
    }

    /// The vectors of the next call, without what goes beyond so many bytes.
    fn vectors_for(&self, mut bytes: u64) -> Vec<libc::iovec> {
        let cut = |vector: &libc::iovec| {
            let iov_len = (vector.iov_len as u64).min(bytes) as usize;
            bytes -= iov_len as u64;
            libc::iovec { iov_len, ..*vector }
        };
        self.vectors().iter().map(cut).take_while(|vector| vector.iov_len > 0).collect()
    }

    fn call(&self, file: &File, bytes: u64) -> isize {
        let (vectors, offset) = (self.vectors_for(bytes), self.offset as i64);
        let (fd, first, count) = (file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32);
        // SAFETY: the vectors name guest RAM that `self.memory` keeps mapped, to which no reference exists; the kernel
        // answers EFAULT where a page can't be had.
        unsafe {
            match self.write {
                true => libc::pwritev(fd, first, count, offset),
                false => libc::preadv(fd, first, count, offset),
            }
        }
    }
}

/// What a read did before it failed was written too.
impl Drop for Transfer {
    fn drop(&mut self) {
        self.mark_written();
    }
}

fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, FallocateFlags::PUNCH_HOLE, offset, len)
}

/// `fallocate(2)` takes no empty range.
fn allocate(file: &File, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    Ok(rustix::fs::fallocate(file, how | FallocateFlags::KEEP_SIZE, offset, len)?)
}

/// Not every file system can zero a range; every one can be written to.
pub(super) fn zero(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    match allocate(file, how, offset, len) {
        Err(error) if has_no_such_call(&error) => {}
        done => return done,
    }
    let zeroes = vec![0; ZEROES.min(len as usize)];
    let end = offset + len;
    for at in (offset..end).step_by(ZEROES) {
        file.write_all_at(&zeroes[..zeroes.len().min((end - at) as usize)], at)?;
    }
    Ok(())
}

fn has_no_such_call(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}
