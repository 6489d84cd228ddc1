//! The end of what somebody says.
//!
//! In: bytes. Out: the lines of the last of them. Holds: no more than a given number is kept.

use std::collections::VecDeque;
use std::io::{self, Write};

/// The last bytes that were written.
pub(crate) struct Tail {
    bytes: VecDeque<u8>,
    max: usize,
}

impl Tail {
    /// Of at most so many bytes.
    pub(crate) fn of(max: usize) -> Self {
        Self { bytes: VecDeque::new(), max }
    }

    /// The lines that say anything, without the blanks around them; of the first the beginning may be missing.
    pub(crate) fn lines(&self) -> Vec<String> {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// The last of them.
    pub(crate) fn last_line(&self) -> Option<String> {
        self.lines().pop()
    }
}

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend(bytes);
        let more = self.bytes.len().saturating_sub(self.max);
        self.bytes.drain(..more);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_kept_and_nothing_else() {
        let mut tail = Tail::of(10);
        assert_eq!(tail.last_line(), None);
        tail.write_all(b"one\n two \n").unwrap();
        assert_eq!(tail.lines(), ["one", "two"]);
        tail.write_all(b"\nthree\n\n").unwrap();
        assert_eq!(tail.lines(), ["three"]);
        assert_eq!(tail.bytes.len(), 10);
    }
}
