//! CRC-32 (IEEE 802.3).
//!
//! In: bytes, in pieces. Out: their CRC. Holds: with the feature `fast` it is `crc32fast`'s, else a short one of our own, since
//! tables and vector code for the long one are longer than the rest of the restore stub; a test compares them.

#[cfg(feature = "fast")]
pub(crate) use crc32fast::Hasher;
#[cfg(not(feature = "fast"))]
pub(crate) use short::Hasher;

/// Of these bytes.
pub(crate) fn hash(bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(any(test, not(feature = "fast")))]
mod short {
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

    /// A CRC of bytes that come in pieces.
    pub(crate) struct Hasher(u32);

    impl Hasher {
        /// Of nothing so far.
        pub(crate) fn new() -> Self {
            Self(!0)
        }

        /// Takes the next piece.
        pub(crate) fn update(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = self.0 >> 8 ^ TABLE[(self.0 as u8 ^ byte) as usize];
            }
        }

        /// The CRC.
        pub(crate) fn finalize(self) -> u32 {
            !self.0
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn the_short_one_is_the_fast_one(bytes: Vec<u8>, cut: usize) {
            let mut short = super::short::Hasher::new();
            let (head, tail) = bytes.split_at(cut % (bytes.len() + 1));
            short.update(head);
            short.update(tail);
            assert_eq!(short.finalize(), crc32fast::hash(&bytes));
        }
    }
}
