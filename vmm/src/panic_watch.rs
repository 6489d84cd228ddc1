//! Sees a Linux panic on the console.
//!
//! In: the console's output, byte for byte. Out: the same bytes, and whether `Kernel panic - not syncing` was among
//! them. Holds: nothing is kept back. A kernel without a driver for the panic device says no more than this before the
//! reset that `panic=` asks for; a guest that prints the words without a panic deceives only its own exit status.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const WORDS: &[u8] = b"Kernel panic - not syncing";

/// Whether the words have been seen; clones see the same.
#[derive(Clone, Default)]
pub struct PanicWatch(Arc<AtomicBool>);

impl PanicWatch {
    /// Whether the words have gone by.
    pub fn seen(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Puts the watch in front of an output.
    pub fn over<W: Write>(self, out: W) -> Watched<W> {
        Watched { out, matched: 0, watch: self }
    }
}

/// An output with the watch in front of it.
pub struct Watched<W> {
    out: W,
    matched: usize,
    watch: PanicWatch,
}

impl<W> Watched<W> {
    /// The words begin with a letter that is nowhere else in them, so a mismatch can only start anew with that letter.
    fn look(&mut self, byte: u8) {
        self.matched = match byte {
            _ if byte == WORDS[self.matched] => self.matched + 1,
            _ => usize::from(byte == WORDS[0]),
        };
        if self.matched == WORDS.len() {
            self.matched = 0;
            self.watch.0.store(true, Ordering::Relaxed);
        }
    }
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        bytes[..written].iter().for_each(|byte| self.look(*byte));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sees(text: &str) -> bool {
        let watch = PanicWatch::default();
        let mut out = watch.clone().over(Vec::new());
        text.bytes().for_each(|byte| out.write_all(&[byte]).unwrap());
        assert_eq!(out.out, text.as_bytes());
        watch.seen()
    }

    #[test]
    fn the_words_are_seen_and_nothing_less() {
        assert!(sees("[ 1.0] Kernel panic - not syncing: VFS"));
        assert!(sees("KKernel Kernel panic - not syncing"));
        assert!(!sees("Kernel panic - not  syncing"));
    }
}
