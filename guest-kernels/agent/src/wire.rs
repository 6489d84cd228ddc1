//! Frames on a stream of bytes.
//!
//! In: bytes, in whatever pieces they come. Out: frames, and the other way round. Holds: a frame has at most [`MAX_PAYLOAD`]
//! bytes of payload, known from its header before any of it is stored.

use std::io::{self, Read, Write};

/// The longest payload, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;
const HEADER: usize = 8;

/// A message whose meaning isn't looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: u32,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Why there is no frame.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A header announces too much.
    #[error("a frame of {0} bytes, at most {MAX_PAYLOAD} are allowed")]
    TooLong(usize),
    /// The stream ended inside a frame.
    #[error("the stream ended in the middle of a frame")]
    CutOff,
    /// A frame that means nothing, or not here.
    #[error("{0}")]
    Unexpected(String),
    /// The stream failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Puts frames together.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Reads once. 0 is the end of the stream.
    ///
    /// # Errors
    /// What the stream says; interruptions are tried again.
    pub fn fill(&mut self, stream: &mut impl Read) -> io::Result<usize> {
        let mut block = [0; 16 << 10];
        loop {
            match stream.read(&mut block) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(count) => {
                    self.bytes.extend_from_slice(&block[..count]);
                    return Ok(count);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The next frame, if all of it has come.
    ///
    /// # Errors
    /// [`WireError::TooLong`].
    pub fn take(&mut self) -> Result<Option<Frame>, WireError> {
        let Some((length, rest)) = self.bytes.split_first_chunk() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_PAYLOAD {
            return Err(WireError::TooLong(length));
        }
        let Some((kind, rest)) = rest.split_first_chunk() else { return Ok(None) };
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Frame { kind: u32::from_le_bytes(*kind), payload: payload.to_vec() };
        self.bytes.drain(..HEADER + length);
        Ok(Some(frame))
    }

    /// Waits for the next frame; `None` at the end of the stream.
    ///
    /// # Errors
    /// The stream fails or ends inside a frame, or the frame is too long.
    pub fn receive(&mut self, stream: &mut impl Read) -> Result<Option<Frame>, WireError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            if self.fill(stream)? == 0 {
                return if self.bytes.is_empty() { Ok(None) } else { Err(WireError::CutOff) };
            }
        }
    }
}

/// Writes a frame.
///
/// # Errors
/// The payload is too long, or the stream fails.
pub fn send(stream: &mut impl Write, frame: &Frame) -> Result<(), WireError> {
    let length = frame.payload.len();
    if length > MAX_PAYLOAD {
        return Err(WireError::TooLong(length));
    }
    let header = [(length as u32).to_le_bytes(), frame.kind.to_le_bytes()].concat();
    Ok(stream.write_all(&[header, frame.payload.clone()].concat())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_comes_in_any_pieces() {
        let frame = Frame { kind: 7, payload: b"payload".to_vec() };
        let mut bytes = Vec::new();
        send(&mut bytes, &frame).unwrap();
        send(&mut bytes, &frame).unwrap();
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        for byte in bytes {
            decoder.fill(&mut &[byte][..]).unwrap();
            seen.extend(decoder.take().unwrap());
        }
        assert_eq!(seen, [frame.clone(), frame]);
    }

    #[test]
    fn a_long_frame_is_refused_by_its_header_alone() {
        let mut decoder = Decoder::default();
        decoder.fill(&mut &(MAX_PAYLOAD as u32 + 1).to_le_bytes()[..]).unwrap();
        assert!(matches!(decoder.take(), Err(WireError::TooLong(n)) if n == MAX_PAYLOAD + 1));
        let frame = Frame { kind: 1, payload: vec![0; MAX_PAYLOAD + 1] };
        assert!(matches!(send(&mut Vec::new(), &frame), Err(WireError::TooLong(_))));
    }

    #[test]
    fn an_end_inside_a_frame_is_told_from_an_end_between_frames() {
        let mut decoder = Decoder::default();
        assert!(decoder.receive(&mut &b""[..]).unwrap().is_none());
        assert!(matches!(decoder.receive(&mut &[1, 0, 0, 0][..]), Err(WireError::CutOff)));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_a_frame_an_error_or_not_enough(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            decoder.fill(&mut &bytes[..]).unwrap();
            while let Ok(Some(frame)) = decoder.take() {
                prop_assert!(frame.payload.len() <= bytes.len());
            }
        }
    }
}
