//! The end of the output, told apart from the output.
//!
//! In: bytes from the lab's channel. Out: the command's own bytes, and its status once it has ended. Holds: every byte
//! beside the tokens' lines is passed on unchanged, and nothing that could still be a token's beginning is.
//!
//! ```text
//! output of the command, any bytes │ token: 32 hexadecimal digits │ nothing, a sign of life, or status, decimal │ \n or \r\n
//! ```

use anyhow::{Context, Result};

/// Finds the token in a stream that comes in pieces of any size.
#[derive(Debug)]
pub(super) struct Scanner {
    token: Vec<u8>,
    held: Vec<u8>,
}

/// A token that no command will print by chance.
pub(super) fn token() -> Result<String> {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot make a token")?;
    Ok(uuid.trim().replace('-', ""))
}

impl Scanner {
    pub(super) fn new(token: &str) -> Scanner {
        Scanner { token: token.as_bytes().to_vec(), held: Vec::new() }
    }

    /// Takes the next bytes; returns what is surely output, and the status when it is there.
    pub(super) fn push(&mut self, bytes: &[u8]) -> (Vec<u8>, Option<u8>) {
        self.held.extend_from_slice(bytes);
        let mut output = Vec::new();
        loop {
            let at = find(&self.held, &self.token);
            let end = at.unwrap_or(self.held.len() - self.undecided());
            output.extend(self.held.drain(..end));
            let Some(line) = at.and_then(|_| self.take_line()) else { return (output, None) };
            if let Ok(status) = line.parse() {
                return (output, Some(status));
            }
        }
    }

    /// Takes the token's line and returns what follows the token, once the line is whole.
    fn take_line(&mut self) -> Option<String> {
        let end = self.held.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.held.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line[self.token.len()..]).trim_end().to_owned())
    }

    /// What was held back, when the stream ends without a token.
    pub(super) fn rest(self) -> Vec<u8> {
        self.held
    }

    /// How many of the last bytes may be the beginning of the token.
    fn undecided(&self) -> usize {
        let most = self.held.len().min(self.token.len() - 1);
        (1..=most).rev().find(|&n| self.held.ends_with(&self.token[..n])).unwrap_or(0)
    }
}

fn find(bytes: &[u8], token: &[u8]) -> Option<usize> {
    bytes.windows(token.len()).position(|window| window == token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "00112233445566778899aabbccddeeff";

    /// Everything that comes out when the bytes go in in pieces of `size`.
    fn scan(bytes: &[u8], size: usize) -> (Vec<u8>, Option<u8>) {
        let mut scanner = Scanner::new(TOKEN);
        let mut output = Vec::new();
        for piece in bytes.chunks(size) {
            let (more, status) = scanner.push(piece);
            output.extend(more);
            if status.is_some() {
                return (output, status);
            }
        }
        output.extend(scanner.rest());
        (output, None)
    }

    #[test]
    fn output_is_unchanged_and_the_status_found_in_pieces_of_any_size() {
        let stream = [b"\x00\xff 0011 no token\n0", TOKEN.as_bytes(), b"7\n"].concat();
        for size in 1..=stream.len() {
            assert_eq!(
                scan(&stream, size),
                (b"\x00\xff 0011 no token\n0".to_vec(), Some(7)),
                "pieces of {size}"
            );
        }
    }

    #[test]
    fn signs_of_life_are_no_output() {
        let stream = format!("{TOKEN}\none{TOKEN}\r\n two\n{TOKEN}\n{TOKEN}0\n");
        for size in 1..=stream.len() {
            assert_eq!(scan(stream.as_bytes(), size), (b"one two\n".to_vec(), Some(0)), "pieces of {size}");
        }
    }

    #[test]
    fn a_terminal_ends_its_lines_with_two_characters() {
        assert_eq!(scan(format!("{TOKEN}130\r\n").as_bytes(), 3), (vec![], Some(130)));
    }

    #[test]
    fn a_stream_without_a_token_has_no_status() {
        assert_eq!(scan(b"half a token: 00112233", 5), (b"half a token: 00112233".to_vec(), None));
    }

    #[test]
    fn output_is_not_held_back_longer_than_needed() {
        let mut scanner = Scanner::new(TOKEN);
        assert_eq!(scanner.push(b"prompt> 001"), (b"prompt> ".to_vec(), None));
        assert_eq!(scanner.push(b"x"), (b"001x".to_vec(), None));
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(token().unwrap(), token().unwrap());
        assert_eq!(token().unwrap().len(), TOKEN.len());
    }
}
