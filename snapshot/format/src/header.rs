//! The fixed header: the one note whose length never changes, checked before any decoder sees a byte.
//!
//! In: the other notes' bytes, or this note's. Out: their lengths and CRCs. Holds: every byte is either under the CRC
//! or the CRC itself.
//!
//! ```text
//!  0  magic          8 bytes
//!  8  version        u32        all little-endian
//! 12  for debuggers  u32 length of the descriptors of NT_PRSTATUS and VMCOREINFO together, u32 CRC-32
//! 20  manifest       u32 length, u32 CRC-32
//! 28  chunk table    u32 length, u32 CRC-32
//! 36  machine state  u32 length; each section has its CRC in the manifest
//! 40  CRC-32         u32 of the bytes before it
//! ```

use crate::{Expected, FORMAT_VERSION, Fault, Part, crc, note, number};

/// First bytes of the fixed header. The first is no ASCII, the last one would not survive a text conversion.
pub const MAGIC: [u8; 8] = *b"\x89VMSNAP\n";
/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 44;
/// Offset of its CRC.
const CRC_AT: usize = HEADER_LEN - 4;

/// Length and CRC-32 (IEEE 802.3) of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// In bytes.
    pub len: u32,
    /// Of the bytes.
    pub crc: u32,
}

impl Frame {
    /// The frame of these bytes, one part after another; the limit on notes keeps them far below 4 GiB.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = crc::Hasher::new();
        let mut len = 0u32;
        for part in parts {
            hasher.update(part);
            len = len.saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
        }
        Frame { len, crc: hasher.finalize() }
    }

    /// Refuses bytes of another length or another CRC.
    ///
    /// # Errors
    /// The one or the other.
    pub fn check<'a>(&self, what: Part, parts: impl IntoIterator<Item = &'a [u8]>) -> Result<(), Fault> {
        let found = Self::of(parts);
        if found.len != self.len {
            let (found, expected) = (found.len.into(), self.len.into());
            return Err(Fault::Length { what, found, expected });
        }
        if found.crc != self.crc {
            return Err(Fault::Checksum { what, found: found.crc, expected: self.crc });
        }
        Ok(())
    }
}

/// Refuses bytes of another length.
pub(crate) fn check_len(what: Part, bytes: &[u8], expected: u64) -> Result<(), Fault> {
    let found = bytes.len() as u64;
    if found == expected { Ok(()) } else { Err(Fault::Length { what, found, expected }) }
}

/// What the fixed header records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedHeader {
    /// The descriptors of the notes for debuggers, one after another: all NT_PRSTATUS, then VMCOREINFO if there is one.
    pub debugger: Frame,
    /// The manifest.
    pub manifest: Frame,
    /// The chunk table.
    pub table: Frame,
    /// Bytes of the machine state.
    pub state_len: u32,
}

impl FixedHeader {
    /// The note's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let Self { debugger, manifest, table, state_len } = self;
        let numbers =
            [debugger.len, debugger.crc, manifest.len, manifest.crc, table.len, table.crc, *state_len];
        let mut out = [0; HEADER_LEN];
        out[..8].copy_from_slice(&MAGIC);
        let all = core::iter::once(FORMAT_VERSION).chain(numbers);
        for (place, number) in out[8..CRC_AT].chunks_exact_mut(4).zip(all) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        let crc = crc::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Checks length, magic, version and CRC, in this order, and only then takes the numbers.
    ///
    /// # Errors
    /// The first of them that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let what = Part::Named(note::HEADER.1);
        check_len(what, bytes, HEADER_LEN as u64)?;
        check_magic(what, bytes)?;
        let number = |at: usize| number(bytes, at, 4) as u32;
        if number(8) != FORMAT_VERSION {
            return Err(Fault::Version { found: number(8) });
        }
        let own = Frame { len: CRC_AT as u32, crc: number(CRC_AT) };
        own.check(what, [&bytes[..CRC_AT]])?;
        let frame = |at| Frame { len: number(at), crc: number(at + 4) };
        Ok(Self { debugger: frame(12), manifest: frame(20), table: frame(28), state_len: number(36) })
    }
}

fn check_magic(what: Part, bytes: &[u8]) -> Result<(), Fault> {
    if bytes.starts_with(&MAGIC) {
        return Ok(());
    }
    let found = number(bytes, 0, 8).swap_bytes();
    let expected = Expected::One(u64::from_be_bytes(MAGIC));
    Err(Fault::Field { what, field: "magic", found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> FixedHeader {
        let frame = |n: u32| Frame { len: n, crc: n.wrapping_mul(0x9e37_79b9) };
        FixedHeader { debugger: frame(336), manifest: frame(77), table: frame(16), state_len: 1000 }
    }

    #[test]
    fn decodes_what_it_encodes() {
        assert_eq!(FixedHeader::decode(&example().encode()).unwrap(), example());
    }

    #[test]
    fn refuses_any_flipped_bit() {
        let good = example().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FixedHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn refuses_any_other_length() {
        let mut bytes = example().encode().to_vec();
        bytes.push(0);
        assert!(FixedHeader::decode(&bytes).is_err());
        for len in 0..HEADER_LEN {
            assert!(FixedHeader::decode(&bytes[..len]).is_err());
        }
    }
}
