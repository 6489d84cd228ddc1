//! Archives: snapshots that are kept for long, compressed.
//!
//! In: a snapshot, or an archive. Out: the other. Holds: an archive is in the Zstandard seekable format, a frame for each MiB, so that
//! `zstd -d` reads it too, and a part of it can be had without the rest; what comes out of one is checked like any snapshot before it
//! has its name. Neither takes more memory for a larger machine.
//!
//! Nothing runs from an archive: pages that are shared with other machines, and come when they are touched, are those of a file as it is.

use crate::complaint::printable;
use crate::disk::write_data;
use crate::inspect::progress_bar;
use serde::Serialize;
use snapshot::publish::{NewFile, PublishError};
use snapshot::{KeyError, OpenError, RamError, SealError, SealKey, UnverifiedSnapshot, VerifyError};
use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use zeekstd::{EncodeOptions, FrameSizePolicy};
use zstd::stream::read::Decoder;

/// Uncompressed bytes of a frame, and what is in memory at a time.
const FRAME: u32 = 1 << 20;
/// The level that `zstd` takes as well if it isn't told another.
const LEVEL: i32 = 3;
/// Binary logarithm of the most memory that the decoder takes for a frame, in bytes: several times what a frame needs.
const WINDOW_LOG: u32 = 23;

/// What went wrong with an archive. Nothing new is there.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// What is to be packed, or what was unpacked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no snapshot.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// There is no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It was written by somebody else.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Its RAM is damaged.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The new file.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// No archive, or a damaged one.
    #[error("{} is not a usable archive: {reason}, expected what `vmm pack` writes", path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// What the decoder says.
        reason: String,
    },
    /// The host failed.
    #[error("cannot {step} {}", path.display())]
    Io {
        /// What was to be done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// Lengths of both files, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Packed {
    /// The snapshot's, holes included.
    #[serde(rename = "snapshot_bytes")]
    pub snapshot: u64,
    /// The archive's.
    #[serde(rename = "archive_bytes")]
    pub archive: u64,
}

/// Writes a snapshot, all of which has been checked, as an archive. The file that `archive` names may be replaced.
///
/// # Errors
/// See [`ArchiveError`].
pub fn pack(snapshot: &Path, archive: &Path) -> Result<Packed, ArchiveError> {
    let checked = UnverifiedSnapshot::open(snapshot)?.verify()?;
    checked.verify_ram(&mut |_, _| {})?;
    let new = NewFile::create(archive)?;
    let failed = |source| ArchiveError::Io { step: "write", path: new.target().to_owned(), source };
    let length = checked.file_len();
    let packed = compress(checked.file(), length, new.file()).map_err(failed)?;
    new.publish()?;
    Ok(Packed { snapshot: length, archive: packed })
}

/// Writes the snapshot that is in an archive, once it has been checked, against the key in a file too if one is given. The file that `snapshot` names may be replaced.
///
/// # Errors
/// See [`ArchiveError`].
pub fn unpack(archive: &Path, snapshot: &Path, key: Option<&Path>) -> Result<Packed, ArchiveError> {
    let key = key.map(SealKey::read).transpose()?;
    let unreadable = |source| ArchiveError::Io { step: "read", path: archive.to_owned(), source };
    let unusable = |reason| ArchiveError::Archive { path: archive.to_owned(), reason };
    let file = File::open(archive).map_err(unreadable)?;
    let packed = file.metadata().map_err(unreadable)?.len();
    let new = NewFile::create(snapshot)?;
    let length = decompress(file, packed, new.file()).map_err(|stop| match stop {
        Stop::Archive(reason) => unusable(reason),
        Stop::Write(source) => ArchiveError::Io { step: "write", path: new.target().to_owned(), source },
    })?;
    let again = new.file().try_clone().map_err(unreadable)?;
    let mut checked = UnverifiedSnapshot::of(again, snapshot.to_owned()).verify()?;
    if let Some(key) = key {
        checked = checked.authenticate(&key)?;
    }
    checked.verify_ram(&mut |_, _| {})?;
    new.publish()?;
    Ok(Packed { snapshot: length, archive: packed })
}

fn compress(from: &File, length: u64, to: &File) -> io::Result<u64> {
    let options = EncodeOptions::new().compression_level(LEVEL).checksum_flag(true);
    let options = options.frame_size_policy(FrameSizePolicy::Uncompressed(FRAME));
    let mut encoder = options.into_encoder(BufWriter::new(to)).map_err(io::Error::other)?;
    let (bar, mut buf) = (progress_bar("packing", length), vec![0; FRAME as usize]);
    let mut at = 0;
    while at < length {
        let part = &mut buf[..(length - at).min(u64::from(FRAME)) as usize];
        from.read_exact_at(part, at)?;
        encoder.compress(part).map_err(io::Error::other)?;
        at += part.len() as u64;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    encoder.finish().map_err(io::Error::other)
}

enum Stop {
    Archive(String),
    Write(io::Error),
}

/// Frame by frame, as `zstd -d` does: what the seek table says is not believed. Zeroes become holes, so that an archive of more zeroes than
/// any disk has room for fills none.
fn decompress(from: File, packed: u64, to: &File) -> Result<u64, Stop> {
    let damaged = |error: io::Error| Stop::Archive(error.to_string());
    let bar = progress_bar("unpacking", packed);
    let mut decoder = Decoder::new(bar.wrap_read(from)).map_err(damaged)?;
    decoder.window_log_max(WINDOW_LOG).map_err(damaged)?;
    let (mut buf, mut at) = (vec![0; FRAME as usize], 0);
    loop {
        let count = decoder.read(&mut buf).map_err(damaged)?;
        if count == 0 {
            break;
        }
        write_data(to, at, &buf[..count]).map_err(Stop::Write)?;
        at += count as u64;
    }
    to.set_len(at).map_err(Stop::Write)?;
    bar.finish_and_clear();
    Ok(at)
}

/// For a person.
pub fn told(archive: &Path, packed: Packed) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (from, to) = (mib(packed.snapshot), mib(packed.archive));
    let name = printable(&archive.display().to_string());
    format!(
        "{name}: {from:.1} MiB packed into {to:.1} MiB; nothing runs from an archive: `vmm unpack` comes first"
    )
}
