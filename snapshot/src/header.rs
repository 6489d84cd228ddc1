//! The fixed header: the one note whose length never changes, checked before any decoder sees a byte.
//!
//! In: the other notes' bytes, or this note's. Out: their lengths and CRCs. Holds: every byte is either under the CRC
//! or the CRC itself.
//!
//! ```text
//!  0  magic          8 bytes
//!  8  version        u32        all little-endian
//! 12  NT_PRSTATUS    u32 length of all descriptors together, u32 CRC-32
//! 20  manifest       u32 length, u32 CRC-32
//! 28  chunk table    u32 length, u32 CRC-32
//! 36  machine state  u32 length; each section has its CRC in the manifest
//! 40  CRC-32         u32 of the bytes before it
//! ```

use crate::{FORMAT_VERSION, fault::Fault};

/// First bytes of the fixed header. The first is no ASCII, the last one would not survive a text conversion.
pub(crate) const MAGIC: [u8; 8] = *b"\x89VMSNAP\n";
/// Bytes of the fixed header.
pub(crate) const HEADER_LEN: usize = 44;

/// Length and CRC-32 (IEEE 802.3) of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) len: u32,
    pub(crate) crc: u32,
}

impl Frame {
    /// The frame of `bytes`, which the limit on notes keeps far below 4 GiB.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let len = u32::try_from(bytes.len()).expect("notes are limited to 4 MiB");
        Frame { len, crc: crc32fast::hash(bytes) }
    }

    /// Refuses bytes of another length or another CRC.
    pub(crate) fn check(&self, what: &str, bytes: &[u8]) -> Result<(), Fault> {
        check_len(what, bytes, u64::from(self.len))?;
        check_crc(what, bytes, self.crc)
    }
}

/// Refuses bytes of another length.
pub(crate) fn check_len(what: &str, bytes: &[u8], expected: u64) -> Result<(), Fault> {
    let found = bytes.len() as u64;
    if found == expected {
        return Ok(());
    }
    Err(Fault::Length { what: what.to_owned(), found, expected })
}

/// Refuses bytes with another CRC.
pub(crate) fn check_crc(what: &str, bytes: &[u8], expected: u32) -> Result<(), Fault> {
    let found = crc32fast::hash(bytes);
    if found == expected {
        return Ok(());
    }
    Err(Fault::Checksum { what: what.to_owned(), found, expected })
}

/// What the fixed header records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FixedHeader {
    pub(crate) prstatus: Frame,
    pub(crate) manifest: Frame,
    pub(crate) table: Frame,
    pub(crate) state_len: u32,
}

impl FixedHeader {
    /// The note's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let Self { prstatus, manifest, table, state_len } = self;
        let mut out = MAGIC.to_vec();
        let numbers = [FORMAT_VERSION, prstatus.len, prstatus.crc, manifest.len, manifest.crc, table.len];
        for number in numbers.into_iter().chain([table.crc, *state_len]) {
            out.extend(number.to_le_bytes());
        }
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Checks length, magic, version and CRC, in this order, and only then takes the numbers.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        check_len("fixed header", bytes, HEADER_LEN as u64)?;
        check_magic(bytes)?;
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if number(8) != FORMAT_VERSION {
            return Err(Fault::Version { found: number(8) });
        }
        check_crc("fixed header", &bytes[..HEADER_LEN - 4], number(HEADER_LEN - 4))?;
        let frame = |at| Frame { len: number(at), crc: number(at + 4) };
        Ok(Self { prstatus: frame(12), manifest: frame(20), table: frame(28), state_len: number(36) })
    }
}

fn check_magic(bytes: &[u8]) -> Result<(), Fault> {
    if bytes.starts_with(&MAGIC) {
        return Ok(());
    }
    let found = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
    let expected = format!("{:#x}", u64::from_be_bytes(MAGIC));
    Err(Fault::Field { what: "fixed header".to_owned(), field: "magic", found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> FixedHeader {
        let frame = |n: u32| Frame { len: n, crc: n.wrapping_mul(0x9e37_79b9) };
        FixedHeader { prstatus: frame(336), manifest: frame(77), table: frame(16), state_len: 1000 }
    }

    #[test]
    fn decodes_what_it_encodes() {
        assert_eq!(FixedHeader::decode(&example().encode()).unwrap(), example());
    }

    #[test]
    fn refuses_any_flipped_bit() {
        let good = example().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FixedHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn refuses_any_other_length() {
        let mut bytes = example().encode();
        bytes.push(0);
        assert!(FixedHeader::decode(&bytes).is_err());
        for len in 0..HEADER_LEN {
            assert!(FixedHeader::decode(&bytes[..len]).is_err());
        }
    }
}
