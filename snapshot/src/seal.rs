//! Seals: whether a snapshot was written by somebody who has a key.
//!
//! In: a key; the notes of a snapshot, and RAM as it is in the file. Out: one more note, or whether it is right. Holds: the tag covers
//! every note that a reader believes, and a digest of each chunk of RAM that no two chunks share by design; where things lie in the file
//! is not covered, since that follows from the notes, or is found by them.
//!
//! ```text
//!  0  version   u32 = 1, little-endian
//!  4  tag       32 bytes: BLAKE3, keyed with what `derive_key` makes of the key file, of the next two
//!               BLAKE3 of the notes before this one, registers first, as the writer lays them out
//! 36  digests   32 bytes for each chunk of RAM: BLAKE3
//!     CRC-32    u32 of all that: damage is told from forgery
//! ```

use crate::ram_check::Chunks;
use crate::{CHUNK_SIZE, MappedRange, PAGE_SIZE, chunk};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// BLAKE3, 256 bits.
pub(crate) type Digest = [u8; 32];

const VERSION: u32 = 1;
/// What makes these keys different from those that anybody else makes of the same file.
const CONTEXT: &str = "vmm 2026-11-21 snapshot seal tag";
/// Bytes of a key file.
const KEY_LEN: RangeInclusive<usize> = 32..=4096;
/// The digest of a whole chunk of zeroes.
static ZERO: LazyLock<Digest> = LazyLock::new(|| zeroes(CHUNK_SIZE));

/// A key, made of a file's bytes.
#[derive(Clone)]
pub struct SealKey([u8; 32]);

/// Nobody sees a key by accident.
impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey")
    }
}

/// There is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read.
    #[error("cannot read the key {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is too short to be secret, or something else.
    #[error("{} is no key: expected {} to {} random bytes", .0.display(), KEY_LEN.start(), KEY_LEN.end())]
    Length(PathBuf),
}

/// A snapshot is not known to be one's own.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Nobody sealed it.
    #[error("{} was written without a key, and one is asked for", .0.display())]
    None(PathBuf),
    /// Somebody else did.
    #[error("{} was not written with this key, or was changed since", .0.display())]
    Wrong(PathBuf),
}

impl SealKey {
    /// Reads a key: any 32 to 4096 bytes that nobody can guess.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let mut material = Vec::new();
        let file = File::open(path);
        file.and_then(|file| file.take(*KEY_LEN.end() as u64 + 1).read_to_end(&mut material))
            .map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
        if !KEY_LEN.contains(&material.len()) {
            return Err(KeyError::Length(path.to_owned()));
        }
        Ok(Self::of(&material))
    }

    /// The key that these bytes make.
    pub fn of(material: &[u8]) -> Self {
        Self(blake3::derive_key(CONTEXT, material))
    }

    fn tag(&self, notes: &Digest, digests: &[Digest]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(notes);
        hasher.update(digests.as_flattened());
        hasher.finalize()
    }
}

/// A seal in a file whose CRC is right, with what it is said to be of.
#[derive(Clone, Debug)]
pub(crate) struct Seal {
    notes: Digest,
    tag: Digest,
    /// For each chunk of RAM.
    pub(crate) digests: Vec<Digest>,
}

impl Seal {
    /// Bytes of the note's descriptor, for so many chunks.
    pub(crate) fn len(chunks: u64) -> u64 {
        snapshot_format::note::seal_len(chunks)
    }

    /// The descriptor of a seal over these notes and these digests.
    pub(crate) fn encode(key: &SealKey, notes: &[u8], digests: &[Digest]) -> Vec<u8> {
        let tag = key.tag(blake3::hash(notes).as_bytes(), digests);
        let mut out = [&VERSION.to_le_bytes()[..], tag.as_bytes(), digests.as_flattened()].concat();
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// What is in a descriptor whose length and CRC have been checked.
    pub(crate) fn decode(desc: &[u8], notes: &[u8]) -> Option<Self> {
        let (version, rest) = desc.split_first_chunk::<4>()?;
        let (tag, rest) = rest.split_first_chunk::<32>()?;
        let (digests, crc) = rest.split_at_checked(rest.len().checked_sub(4)?)?;
        let (digests, left) = digests.as_chunks::<32>();
        let whole = *version == VERSION.to_le_bytes() && left.is_empty() && crc.len() == 4;
        whole.then(|| Self { notes: blake3::hash(notes).into(), tag: *tag, digests: digests.to_vec() })
    }

    /// Whether it is of this key. The comparison takes the same time whatever differs.
    pub(crate) fn is_of(&self, key: &SealKey) -> bool {
        key.tag(&self.notes, &self.digests) == blake3::Hash::from_bytes(self.tag)
    }
}

/// A digest of each chunk of RAM, as it is in a file.
pub(crate) fn digests(file: &File, ram: &[MappedRange]) -> io::Result<Vec<Digest>> {
    let mut reader = Chunks::new(file);
    let mut digests = Vec::new();
    for mapped in ram {
        for chunk in chunk::chunks(&[mapped.range]) {
            let mut hasher = Hasher::default();
            let offset = mapped.offset + (chunk.gpa - mapped.range.gpa);
            let has_data = reader.read(offset, chunk.len, &mut |piece| hasher.update(piece))?;
            digests.push(if has_data { hasher.digest() } else { zero_digest(chunk.len) });
        }
    }
    Ok(digests)
}

/// A digest of bytes that come in pieces.
#[derive(Default)]
pub(crate) struct Hasher(blake3::Hasher);

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn digest(self) -> Digest {
        self.0.finalize().into()
    }
}

/// The digest of so many zeroes, whole pages.
pub(crate) fn zero_digest(len: u64) -> Digest {
    if len == CHUNK_SIZE { *ZERO } else { zeroes(len) }
}

/// A page at a time: a chunk of zeroes would be a large part of all the memory that a monitor has.
fn zeroes(len: u64) -> Digest {
    let mut hasher = Hasher::default();
    (0..len / PAGE_SIZE).for_each(|_| hasher.update(&[0; PAGE_SIZE as usize]));
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_have_the_digest_of_zeroes() {
        for len in [4096, CHUNK_SIZE] {
            assert_eq!(zero_digest(len), Digest::from(blake3::hash(&vec![0; len as usize])));
        }
    }

    #[test]
    fn a_seal_is_of_its_key_its_notes_and_its_digests() {
        let [key, other] = [[1; 32], [2; 32]].map(|bytes| SealKey::of(&bytes));
        let desc = Seal::encode(&key, b"notes", &[[7; 32], [8; 32]]);
        assert_eq!(desc.len() as u64, Seal::len(2));
        let seal = Seal::decode(&desc, b"notes").unwrap();
        assert!(seal.is_of(&key) && !seal.is_of(&other));
        assert!(!Seal::decode(&desc, b"other").unwrap().is_of(&key));
        let swapped = Seal { digests: vec![[8; 32], [7; 32]], ..seal };
        assert!(!swapped.is_of(&key));
        for len in 0..desc.len() {
            drop(Seal::decode(&desc[..len], b"notes"));
        }
    }

    #[test]
    fn a_key_is_neither_short_nor_endless() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (len, good) in [(0, false), (31, false), (32, true), (4096, true), (4097, false)] {
            std::fs::write(&path, vec![7; len]).unwrap();
            assert_eq!(SealKey::read(&path).is_ok(), good, "{len}");
        }
        assert!(matches!(SealKey::read(Path::new("/dev/zero")), Err(KeyError::Length(_))));
        assert!(matches!(SealKey::read(dir.path()), Err(KeyError::Read { .. })));
    }
}
