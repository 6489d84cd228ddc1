//! A regular file of known length, read in bounded pieces.
//!
//! In: a path. Out: bytes of it, here or in guest RAM. Holds: opening never blocks, and a range outside the file is an
//! error before anything is read or allocated.

use super::KernelError;
use devices::Memory;
use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// An open kernel or initrd.
pub(super) struct Image<'a> {
    path: &'a Path,
    file: File,
    len: u64,
}

impl<'a> Image<'a> {
    /// Opens a regular file that is not empty; anything else is refused as not being what was `expected`.
    pub(super) fn open(path: &'a Path, expected: &'static str) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Open { path: path.into(), source };
        // O_NONBLOCK, so that a FIFO without a writer is named and not waited for.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let image = Self { path, file, len: metadata.len() };
        match kind(metadata.file_type()) {
            Some(kind) => Err(image.wrong(kind.into(), expected)),
            None if image.len == 0 => Err(image.wrong("empty".into(), expected)),
            None => Ok(image),
        }
    }

    /// The file's length in bytes when it was opened; not zero.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes at `offset`.
    pub(super) fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, KernelError> {
        self.check(offset, len)?;
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(|source| self.unreadable(source))?;
        Ok(bytes)
    }

    /// The structure at `offset`.
    pub(super) fn read<T: ByteValued>(&self, offset: u64) -> Result<T, KernelError> {
        let mut value = T::zeroed();
        let bytes = value.as_mut_slice();
        self.check(offset, bytes.len() as u64)?;
        self.file.read_exact_at(bytes, offset).map_err(|source| self.unreadable(source))?;
        Ok(value)
    }

    /// Copies `len` bytes at `offset` to guest physical `address`.
    pub(super) fn copy(&self, offset: u64, len: u64, mem: &Memory, address: u64) -> Result<(), KernelError> {
        self.check(offset, len)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|source| self.unreadable(source))?;
        mem.read_exact_volatile_from(GuestAddress(address), &mut file, len as usize)
            .map_err(|error| self.unreadable(io::Error::other(error)))
    }

    /// The error for a file that is not what was expected.
    pub(super) fn wrong(&self, found: String, expected: &'static str) -> KernelError {
        KernelError::Wrong { path: self.path.into(), found, expected }
    }

    /// The error for a kernel that is damaged or unsuitable.
    pub(super) fn unusable(&self, reason: String) -> KernelError {
        KernelError::Unusable { path: self.path.into(), reason }
    }

    /// Checks that a kernel may have RAM up to `end`.
    pub(super) fn check_end(&self, end: u64, ram: u64) -> Result<(), KernelError> {
        if end > ram {
            return Err(KernelError::KernelTooLarge { path: self.path.into(), end, ram });
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), KernelError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => {
                let file = self.len;
                Err(self
                    .unusable(format!("it points to {len} bytes at offset {offset}, and has {file} bytes")))
            }
        }
    }

    fn unreadable(&self, source: io::Error) -> KernelError {
        KernelError::Read { path: self.path.into(), source }
    }
}

/// The name of a file that is not a regular one.
fn kind(file: FileType) -> Option<&'static str> {
    let kinds = [
        (file.is_dir(), "a directory"),
        (file.is_fifo(), "a FIFO"),
        (file.is_socket(), "a socket"),
        (file.is_char_device(), "a character device"),
        (file.is_block_device(), "a block device"),
    ];
    kinds.iter().find(|(is, _)| *is).map(|(_, name)| *name)
}
