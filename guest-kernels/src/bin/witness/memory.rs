//! Memory that is checked whole and written anew each round.
//!
//! In: a round's number. Out: the first word that is not what the round before left. Holds: a word's value is a function
//! of its place and the round, so a page that is lost, stale or swapped with another shows.

/// Bytes kept.
pub(crate) const BYTES: usize = 64 << 20;

/// 64-bit words, each with the value that [`word`] gives for the last round.
pub(crate) struct Memory {
    words: Vec<u64>,
}

impl Memory {
    /// Memory as round 0 leaves it.
    pub(crate) fn filled() -> Memory {
        Memory { words: (0..BYTES / 8).map(|index| word(index, 0)).collect() }
    }

    /// Compares every word with what the round before left, and writes this round's.
    pub(crate) fn check_and_renew(&mut self, round: u64) -> Result<(), String> {
        for (index, found) in self.words.iter_mut().enumerate() {
            let expected = word(index, round - 1);
            if *found != expected {
                return Err(format!("memory word {index} holds {found:#x}, expected {expected:#x}"));
            }
            *found = word(index, round);
        }
        Ok(())
    }
}

/// One multiplication, because this runs eight million times a round on slow machines. It is odd, so no two words of a
/// round are equal.
fn word(index: usize, round: u64) -> u64 {
    ((round << 32) + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_page_is_noticed_and_a_full_round_is_not() {
        let mut memory = Memory { words: (0..1024).map(|index| word(index, 0)).collect() };
        let stale = memory.words[512..].to_vec();
        assert_eq!(memory.check_and_renew(1), Ok(()));
        assert_eq!(memory.check_and_renew(2), Ok(()));
        memory.words[512..].copy_from_slice(&stale);
        let what = memory.check_and_renew(3).unwrap_err();
        assert!(what.starts_with("memory word 512 holds"), "{what}");
    }
}
