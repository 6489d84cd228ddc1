//! The file that a tree of processes is carried in.
//!
//! In: what a guest's `vmm-checkpoint` writes. Out: the same bytes, from a file. Holds: nothing of a file is handed on before all of
//! it has been found to be what was written.
//!
//! ```text
//!  0  "VMMPROC\n"
//!  8  u32  version of this format: 1
//! 12  u32  0
//! 16  u64  bytes from 40 on
//! 24  u64  xxh3 of them
//! 32  u64  xxh3 of bytes 0 to 31
//! 40  "vmm-process 1\n", lines `name=value` (kernel, pids, features of the processor), an empty line; a tar archive of
//!     CRIU's images. Made and understood in guests only.
//! ```
//! Numbers are little-endian.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const MAGIC: &[u8; 8] = b"VMMPROC\n";
const VERSION: u32 = 1;
const HEADER: usize = 40;
/// How all versions of what guests write begin.
const GUESTS: &[u8] = b"vmm-process ";

/// Why a file is not handed on.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// It can't be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a directory, or a device.
    #[error("it is no regular file")]
    Kind,
    /// It is something else, or nothing.
    #[error("it is not what `vmm checkpoint` writes")]
    Magic,
    /// Damage, or a file that was written by hand.
    #[error("its first {HEADER} bytes are damaged")]
    Header,
    /// Another format.
    #[error("it has format {0}, and this is a vmm for format {VERSION}")]
    Version(u32),
    /// Cut off, or not copied to its end.
    #[error("it has {there} bytes instead of {written}")]
    Length {
        /// Bytes of the file.
        there: u64,
        /// Bytes it had when it was written.
        written: u64,
    },
    /// Damage.
    #[error("it is damaged: its bytes are not those that were written")]
    Digest,
    /// Whoever wrote it was no `vmm-checkpoint`.
    #[error("what the guest sent is no process")]
    Guest,
}

/// A file that is being written.
pub struct Writer<'a> {
    file: &'a File,
    length: u64,
    digest: Xxh3,
    beginning: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// To an empty file.
    pub fn new(file: &'a File) -> Self {
        Self { file, length: 0, digest: Xxh3::new(), beginning: Vec::new() }
    }

    /// Makes the file one that can be read.
    ///
    /// # Errors
    /// It can't be written to, or what was written is no process.
    pub fn finish(self) -> Result<(), Unfit> {
        if !self.beginning.starts_with(GUESTS) {
            return Err(Unfit::Guest);
        }
        let header = Header { version: VERSION, length: self.length, digest: self.digest.digest() };
        Ok(self.file.write_all_at(&header.bytes(), 0)?)
    }
}

impl Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let missing = GUESTS.len() - self.beginning.len().min(GUESTS.len());
        self.beginning.extend(bytes.iter().take(missing));
        self.file.write_all_at(bytes, HEADER as u64 + self.length)?;
        self.digest.update(bytes);
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens a file and reads all of it; the next to be read is what the guest wrote.
///
/// # Errors
/// It is not whole, not undamaged, or something else.
pub fn open(path: &Path) -> Result<File, Unfit> {
    // A pipe without a writer would be waited for.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let there = file.metadata()?;
    if !there.is_file() {
        return Err(Unfit::Kind);
    }
    let header = Header::read(&file, there.len())?;
    let written = header.length.saturating_add(HEADER as u64);
    if there.len() != written {
        return Err(Unfit::Length { there: there.len(), written });
    }
    if digest_of_rest(&mut file)? != header.digest {
        return Err(Unfit::Digest);
    }
    file.seek(SeekFrom::Start(HEADER as u64))?;
    Ok(file)
}

fn digest_of_rest(file: &mut File) -> io::Result<u64> {
    file.seek(SeekFrom::Start(HEADER as u64))?;
    let mut digest = Xxh3::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(digest.digest()),
            count => digest.update(&piece[..count]),
        }
    }
}

struct Header {
    version: u32,
    length: u64,
    digest: u64,
}

impl Header {
    fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.digest.to_le_bytes());
        let own = xxh3_64(&bytes[..32]);
        bytes[32..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// Of a file of so many bytes.
    fn read(file: &File, there: u64) -> Result<Self, Unfit> {
        let mut bytes = [0; HEADER];
        let count = usize::try_from(there).unwrap_or(HEADER).min(HEADER);
        file.read_exact_at(&mut bytes[..count], 0)?;
        if &bytes[..8] != MAGIC {
            return Err(Unfit::Magic);
        }
        if count < HEADER || xxh3_64(&bytes[..32]) != number(&bytes, 32) {
            return Err(Unfit::Header);
        }
        // The version stands in a word whose other half is zero.
        let version = number(&bytes, 8) as u32;
        if version != VERSION {
            return Err(Unfit::Version(version));
        }
        Ok(Self { version, length: number(&bytes, 16), digest: number(&bytes, 24) })
    }
}

fn number(bytes: &[u8; HEADER], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const BODY: &[u8] = b"vmm-process 1\nkernel=6.1\n\narchive";

    fn written(dir: &Path) -> PathBuf {
        let path = dir.join("process");
        let file = File::create_new(&path).unwrap();
        let mut writer = Writer::new(&file);
        for piece in BODY.chunks(5) {
            writer.write_all(piece).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut body = Vec::new();
        open(&written(dir.path())).unwrap().read_to_end(&mut body).unwrap();
        assert_eq!(body, BODY);
    }

    #[test]
    fn a_byte_that_is_changed_missing_or_too_many_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            open(&path).expect_err("it is cut short");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(matches!(open(&path), Err(Unfit::Length { there: 74, written: 73 })), "{:?}", open(&path));
        for at in 0..whole.len() {
            let mut other = whole.clone();
            other[at] ^= 0x10;
            std::fs::write(&path, other).unwrap();
            open(&path).expect_err("a byte is another");
        }
    }

    #[test]
    fn what_is_something_else_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other");
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(matches!(open(&path), Err(Unfit::Magic)));
        assert!(matches!(open(dir.path()), Err(Unfit::Kind)));
        std::fs::write(&path, Header { version: 2, length: 0, digest: 0 }.bytes()).unwrap();
        assert!(matches!(open(&path), Err(Unfit::Version(2))));
        let file = File::create(&path).unwrap();
        let mut writer = Writer::new(&file);
        writer.write_all(b"vmm-checkpoint: what?").unwrap();
        assert!(matches!(writer.finish(), Err(Unfit::Guest)));
    }
}
