//! Messages to the kernel's network, without a program that sends them: to start one takes longer than all that is told.
//!
//! In: messages. Out: nothing, or why the kernel refuses. Holds: an answer that is not there yet is not waited for, because the kernel
//! has answered when it has taken a message.
//!
//! Source: netlink(7), rtnetlink(7), Linux `include/uapi/linux/netlink.h`.

use rustix::io::{Errno, Result};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{recv, send, socket_with};

/// The kernel tells whether it has done it.
pub(crate) const ACK: u16 = 0x5;
/// What is not there is made: [`ACK`] and `NLM_F_CREATE`.
pub(crate) const CREATE: u16 = 0x405;
/// And what is there is replaced.
pub(crate) const REPLACE: u16 = 0x505;
/// Of an attribute that holds others.
const NESTED: u16 = 1 << 15;
/// The kind of an answer that has an error, or none.
const ERROR: u16 = 2;
/// Length, kind, flags, number and sender.
const HEADER: usize = 16;

/// Links, addresses and routes; number 0, as which it is no [`Protocol`].
pub(crate) const ROUTE: Option<Protocol> = None;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// `head` is what comes before the attributes in messages of this kind.
    pub(crate) fn new(kind: u16, flags: u16, head: &[u8]) -> Message {
        let mut bytes = [&[0; 4][..], &kind.to_ne_bytes(), &(flags | 1).to_ne_bytes(), &[0; 8]].concat();
        bytes.extend(head);
        Message(bytes)
    }

    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Message {
        append(&mut self.0, kind, value);
        self
    }

    /// Text, which ends with a zero.
    pub(crate) fn text(self, kind: u16, value: &str) -> Message {
        self.with(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// An attribute of attributes.
    pub(crate) fn nested(self, kind: u16, attributes: &[(u16, [u8; 4])]) -> Message {
        let mut value = Vec::new();
        attributes.iter().for_each(|(kind, number)| append(&mut value, *kind, number));
        self.with(kind | NESTED, &value)
    }

    fn bytes(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// Length, kind, value, and padding to four bytes.
fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Sends them at once. Those with [`ACK`] are answered when all are done, and any that is refused.
///
/// # Errors
/// What the kernel says of the first that it refuses.
pub(crate) fn tell(protocol: Option<Protocol>, messages: Vec<Message>) -> Result<()> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
    let bytes: Vec<u8> = messages.into_iter().flat_map(Message::bytes).collect();
    send(&socket, &bytes, SendFlags::empty())?;
    // Without any answer it is not known.
    let mut said = Err(Errno::AGAIN);
    let mut answer = [0; 4096];
    loop {
        match recv(&socket, &mut answer[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => match verdict(&answer[..len]) {
                Some(Ok(())) => said = Ok(()),
                Some(refused) => return refused,
                None => {}
            },
            Err(Errno::AGAIN) => return said,
            Err(error) => return Err(error),
        }
    }
}

/// What an answer says, if it is one.
fn verdict(answer: &[u8]) -> Option<Result<()>> {
    let kind = answer.get(4..6)?.try_into().map(u16::from_ne_bytes).ok()?;
    let error = answer.get(HEADER..HEADER + 4)?.try_into().map(i32::from_ne_bytes).ok()?;
    let said = if error == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(error.wrapping_neg())) };
    (kind == ERROR).then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_tells_its_length_and_attributes_are_padded() {
        let message = Message::new(16, ACK, &[9; 4]).text(3, "eth0").bytes();
        let expected = [
            &[32, 0, 0, 0, 16, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9][..],
            &[9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0],
        ];
        assert_eq!(message, expected.concat());
        let nested = Message::new(16, 0, &[]).nested(4, &[(1, [0, 0, 0, 3])]).bytes();
        assert_eq!(nested[HEADER..], [12, 0, 4, 0x80, 8, 0, 1, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn an_answer_is_an_error_or_none() {
        let answer = |kind: u16, error: i32| {
            [&[36, 0, 0, 0][..], &kind.to_ne_bytes(), &[0; 10], &error.to_ne_bytes(), &[0; 16]].concat()
        };
        assert_eq!(verdict(&answer(ERROR, 0)), Some(Ok(())));
        assert_eq!(verdict(&answer(ERROR, -2)), Some(Err(Errno::NOENT)));
        assert_eq!(verdict(&answer(3, 0)), None);
        assert_eq!(verdict(&answer(ERROR, 0)[..18]), None);
    }

    #[test]
    fn the_kernel_answers_whoever_asks() {
        let up = Message::new(16, ACK, &[0; 16]).text(3, "no-such-link");
        assert_eq!(tell(ROUTE, vec![up]), Err(Errno::NODEV));
    }
}
