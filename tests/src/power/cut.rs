//! What a device holds after a power cut.
//!
//! In: its bytes before, what happened to it, where it is cut off, luck. Out: its bytes. Holds: see [`super`]; what was written after
//! something that had to be on the disk first is not there without it.

use super::log::Entry;
use crate::crash::{Dice, Luck};
use std::collections::BTreeSet;
use std::ops::Range;

/// What a disk writes whole or not at all, in bytes.
pub(super) const PIECE: usize = 4096;

/// A power cut.
pub struct Cut {
    /// After so many entries.
    pub at: usize,
    /// Which of what had not been flushed is there.
    pub luck: Luck,
    pieces: Vec<Piece>,
}

/// A part of what an entry wrote.
type Piece = (usize, Range<usize>);

/// All power cuts from entry `range.start` to `range.end`, each with so many random parts as well; of those that leave the same only one.
pub fn cuts(entries: &[Entry], range: Range<usize>, parts: u64) -> Vec<Cut> {
    let (mut seen, mut cuts) = (BTreeSet::new(), Vec::new());
    for at in range.start..=range.end {
        for luck in [Luck::Worst, Luck::Best].into_iter().chain((1..=parts).map(Luck::Some)) {
            let cut = Cut::new(entries, at, luck);
            let key: Vec<_> = cut.pieces.iter().map(|(entry, part)| (*entry, part.start)).collect();
            // Between two marks the same bytes promise another thing.
            let told = entries[..at].iter().filter(|entry| entry.mark.is_some()).count();
            if seen.insert((told, key)) {
                cuts.push(cut);
            }
        }
    }
    cuts
}

impl Cut {
    fn new(entries: &[Entry], at: usize, luck: Luck) -> Self {
        let flushed = entries[..at].iter().rposition(|entry| entry.flushes).unwrap_or(0);
        let waits = |entry: &Entry| entry.flushes || entry.through || entry.mark.is_some();
        let end = entries[at..].iter().position(waits).map_or(entries.len(), |more| at + more);
        let mut dice = Dice::new(match luck {
            Luck::Some(seed) => seed * 7919 + at as u64,
            _ => 1,
        });
        let mut is_there = |number: usize| match luck {
            _ if number < flushed || number < at && entries[number].through => true,
            Luck::Worst | Luck::OnlyNames => false,
            Luck::Best => number < at,
            Luck::Some(_) => dice.below(2) == 1,
        };
        let mut pieces = Vec::new();
        for (number, entry) in entries[..end].iter().enumerate() {
            let parts = (0..entry.bytes.len()).step_by(PIECE).map(|start| start..start + PIECE);
            pieces.extend(parts.filter(|_| is_there(number)).map(|part| (number, part)));
        }
        Self { at, luck, pieces }
    }

    /// What `base` has become, piece by piece.
    pub fn apply<'a>(&self, base: &'a [u8], entries: &'a [Entry]) -> Vec<&'a [u8]> {
        let mut disk: Vec<_> = base.chunks(PIECE).collect();
        for (number, part) in &self.pieces {
            let Entry { offset, bytes, .. } = &entries[*number];
            disk[(*offset as usize + part.start) / PIECE] = &bytes[part.clone()];
        }
        disk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(page: u64, pages: usize) -> Entry {
        let bytes = vec![1; pages * PIECE];
        Entry { offset: page * PIECE as u64, bytes, flushes: false, through: false, mark: None }
    }

    /// Which of the four pages of a disk have been written.
    fn left(entries: &[Entry], at: usize, luck: Luck) -> [u8; 4] {
        let disk = Cut::new(entries, at, luck).apply(&[0; 4 * PIECE], entries);
        [0, 1, 2, 3].map(|page| disk[page][0])
    }

    #[test]
    fn only_what_was_flushed_or_written_through_is_sure() {
        let flush = Entry { flushes: true, ..write(0, 0) };
        let through = Entry { through: true, ..write(3, 1) };
        let entries = [write(0, 1), flush, write(1, 2), through];
        assert_eq!(left(&entries, 1, Luck::Worst), [0, 0, 0, 0]);
        assert_eq!(left(&entries, 1, Luck::Best), [1, 0, 0, 0]);
        assert_eq!(left(&entries, 2, Luck::Worst), [1, 0, 0, 0]);
        assert_eq!(left(&entries, 3, Luck::Best), [1, 1, 1, 0]);
        assert_eq!(left(&entries, 4, Luck::Worst), [1, 0, 0, 1]);
        let parts: BTreeSet<_> = (1..50).map(|seed| left(&entries, 3, Luck::Some(seed))).collect();
        assert_eq!(parts.len(), 4, "{parts:?}");
        assert!(parts.iter().all(|part| part[3] == 0), "what was to be written after it is there first");
    }

    #[test]
    fn cuts_that_leave_the_same_are_made_once() {
        let entries = [write(0, 1), write(1, 1)];
        assert_eq!(cuts(&entries, 0..2, 0).len(), 3);
        assert!(cuts(&entries, 0..2, 20).len() <= 4);
    }
}
