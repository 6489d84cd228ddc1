//! The log of device mapper's log-writes target.
//!
//! In: the file that was its log device. Out: what it noted, in the order in which it reached the disk, or its cache. Holds: a log
//! without an end, of another version, or of writes that are not whole [pieces](PIECE), is an error.
//!
//! Layout, little-endian (Linux `drivers/md/dm-log-writes.c`): a sector with magic, version, number of entries (`u64` each) and bytes of
//! a sector (`u32`); for each entry a sector with first sector, sectors, flags, bytes of a mark (`u64` each) and the mark, then what was
//! written.

use super::cut::PIECE;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// Something that happened to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where bytes were written.
    pub offset: u64,
    /// What, in whole pieces.
    pub bytes: Vec<u8>,
    /// Whether all that is noted before it was flushed to the disk first.
    pub flushes: bool,
    /// Whether it was written through the cache.
    pub through: bool,
    /// What somebody noted.
    pub mark: Option<String>,
}

/// Reads a log.
///
/// # Errors
/// It is none, it has no end, or something in it is not understood.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let file = File::open(path)?;
    let [magic, version, count, sector] = numbers(&file, 0)?;
    ensure!(magic == MAGIC && version == 1, "{}: magic {magic:#x}, version {version}", path.display());
    let sector = sector & 0xffff_ffff;
    let (mut entries, mut at) = (Vec::new(), sector);
    for _ in 0..count {
        let entry = entry(&file, at, sector)?;
        at += sector + entry.bytes.len() as u64;
        entries.push(entry);
    }
    let last = entries.last().and_then(|entry| entry.mark.as_deref());
    ensure!(last == Some("dm-log-writes-end"), "the log has no end: {last:?}");
    Ok(entries)
}

fn entry(file: &File, at: u64, sector: u64) -> Result<Entry> {
    let [first, sectors, flags, mark] = numbers(file, at)?;
    ensure!(flags & DISCARD == 0, "something was discarded");
    ensure!(mark < sector - 32, "a mark of {mark} bytes");
    let (offset, mut bytes) = (first * sector, vec![0; (sectors * sector) as usize]);
    let is_whole = (offset as usize).is_multiple_of(PIECE) && bytes.len().is_multiple_of(PIECE);
    ensure!(is_whole, "part of a piece was written: {} bytes at {offset}", bytes.len());
    file.read_exact_at(&mut bytes, at + sector).context("the log is cut short")?;
    let mut word = vec![0; mark as usize];
    file.read_exact_at(&mut word, at + 32)?;
    let word = String::from_utf8(word)?.trim_end_matches('\0').to_owned();
    Ok(Entry {
        offset,
        bytes,
        flushes: flags & FLUSH != 0,
        through: flags & FUA != 0,
        mark: (flags & MARK != 0).then_some(word),
    })
}

fn numbers(file: &File, at: u64) -> Result<[u64; 4]> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, at).context("the log is cut short")?;
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    Ok([number(0), number(8), number(16), number(24)])
}
