//! CRC-32 (IEEE 802.3).
//!
//! In: bytes, in pieces. Out: their CRC. Holds: with the feature `fast` it takes 8 bytes at a time, by tables of 8 KiB; else one at a
//! time, since the tables are longer than the rest of the restore stub's data. A test compares them with `crc32fast`.
//!
//! Vector code would be faster still, but whoever chooses it asks the processor what it can do, by `cpuid`; where the host is a guest
//! itself each of these is an exit, and all of them take longer than the CRCs of a snapshot do this way.

#[cfg(feature = "fast")]
pub(crate) use long::Hasher;
#[cfg(not(feature = "fast"))]
pub(crate) use short::Hasher;

/// Of these bytes.
pub(crate) fn hash(bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finalize()
}

/// The polynomial, its lowest power first.
const POLYNOMIAL: u32 = 0xedb8_8320;
static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let (mut value, mut bit) = (index as u32, 0);
        while bit < 8 {
            value = value >> 1 ^ if value & 1 == 1 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

/// The state after one more byte.
fn step(state: u32, byte: u8) -> u32 {
    state >> 8 ^ TABLE[usize::from(state as u8 ^ byte)]
}

#[cfg(any(test, not(feature = "fast")))]
mod short {
    /// A CRC of bytes that come in pieces.
    pub(crate) struct Hasher(u32);

    impl Hasher {
        /// Of nothing so far.
        pub(crate) fn new() -> Self {
            Self(!0)
        }

        /// Takes the next piece.
        pub(crate) fn update(&mut self, bytes: &[u8]) {
            self.0 = bytes.iter().fold(self.0, |state, byte| super::step(state, *byte));
        }

        /// The CRC.
        pub(crate) fn finalize(self) -> u32 {
            !self.0
        }
    }
}

#[cfg(any(test, feature = "fast"))]
mod long {
    /// Bytes that are taken at once.
    const BLOCK: usize = 8;
    /// `TABLES[n]` tells what becomes of a byte when `n` more have followed it.
    static TABLES: [[u32; 256]; BLOCK] = tables();

    const fn tables() -> [[u32; 256]; BLOCK] {
        let mut tables = [super::table(); BLOCK];
        let mut further = 1;
        while further < BLOCK {
            let mut byte = 0;
            while byte < 256 {
                let before = tables[further - 1][byte];
                tables[further][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
                byte += 1;
            }
            further += 1;
        }
        tables
    }

    /// A CRC of bytes that come in pieces.
    pub(crate) struct Hasher(u32);

    impl Hasher {
        /// Of nothing so far.
        pub(crate) fn new() -> Self {
            Self(!0)
        }

        /// Takes the next piece.
        pub(crate) fn update(&mut self, bytes: &[u8]) {
            let (blocks, rest) = bytes.as_chunks::<BLOCK>();
            let state = blocks.iter().fold(self.0, block);
            self.0 = rest.iter().fold(state, |state, byte| super::step(state, *byte));
        }

        /// The CRC.
        pub(crate) fn finalize(self) -> u32 {
            !self.0
        }
    }

    /// The state after 8 more bytes, of which it covers the first four.
    fn block(state: u32, bytes: &[u8; BLOCK]) -> u32 {
        let mut bytes = *bytes;
        bytes.iter_mut().zip(state.to_le_bytes()).for_each(|(byte, covered)| *byte ^= covered);
        let parts = bytes.iter().zip(TABLES.iter().rev());
        parts.fold(0, |sum, (byte, table)| sum ^ table[usize::from(*byte)])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn both_are_the_one_that_everybody_knows(bytes: Vec<u8>, cut: usize) {
            let (mut short, mut long) = (super::short::Hasher::new(), super::long::Hasher::new());
            let (head, tail) = bytes.split_at(cut % (bytes.len() + 1));
            for piece in [head, tail] {
                short.update(piece);
                long.update(piece);
            }
            let known = crc32fast::hash(&bytes);
            assert_eq!((short.finalize(), long.finalize()), (known, known));
        }
    }
}
