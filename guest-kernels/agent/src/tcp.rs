//! The kernel's TCP connections, by `sock_diag`.
//!
//! In: the wish to know them, or to end them. Out: those to other machines. Holds: a connection is ended by the cookie that the
//! kernel gave for it, so never one that came later with the same addresses.
//!
//! Sources: sock_diag(7), netlink(7), Linux `include/uapi/linux/inet_diag.h`. Ending needs `CONFIG_INET_DIAG_DESTROY`, which
//! Debian's kernels have.

use crate::message::{TcpSocket, ip};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};

// netlink(7).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_HEADER: usize = 16;
// sock_diag(7).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// A bit for each state of `include/net/tcp_states.h` in which there is somebody at the other end: ESTABLISHED, SYN_SENT,
/// SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// `struct inet_diag_sockid`: ports and addresses (big-endian), interface, cookie.
const SOCKID: usize = 48;
/// Where `struct inet_diag_msg` has it, behind family, state, timer and retransmits.
const SOCKID_AT: usize = 4;
/// A datagram of a dump is at most this long.
const DATAGRAM: usize = 32 << 10;

/// A connection as the kernel tells of it.
struct Found {
    family: u8,
    id: [u8; SOCKID],
    socket: TcpSocket,
}

/// The connections to other machines.
///
/// # Errors
/// What the kernel says.
pub fn list() -> io::Result<Vec<TcpSocket>> {
    Ok(find()?.into_iter().map(|found| found.socket).collect())
}

/// Ends the connections to other machines, and returns those that were there to be ended.
///
/// # Errors
/// What the kernel says of the first that it can't end.
pub fn kill() -> io::Result<Vec<TcpSocket>> {
    let mut netlink = open()?;
    let mut killed = Vec::new();
    for found in find()? {
        match destroy(&mut netlink, &found) {
            Ok(()) => killed.push(found.socket),
            // It has ended by itself.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(killed)
}

fn open() -> io::Result<File> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?.into())
}

fn find() -> io::Result<Vec<Found>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        dump(&mut open()?, family, &mut all)?;
    }
    all.retain(|found| leaves_this_machine(&found.socket));
    Ok(all)
}

/// Whether the other end is elsewhere. One that isn't has been saved and restored together with this end.
fn leaves_this_machine(socket: &TcpSocket) -> bool {
    let peer = socket.peer.ip().to_canonical();
    !peer.is_loopback() && peer != socket.local.ip().to_canonical()
}

/// Asks for a family's connections and collects them.
fn dump(netlink: &mut File, family: u8, found: &mut Vec<Found>) -> io::Result<()> {
    netlink.write_all(&request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, &[0; SOCKID]))?;
    let mut block = vec![0; DATAGRAM];
    loop {
        let count = netlink.read(&mut block)?;
        for (kind, body) in messages(&block[..count]) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return error(body),
                SOCK_DIAG_BY_FAMILY => found.extend(parse(body)),
                _ => {}
            }
        }
    }
}

fn destroy(netlink: &mut File, found: &Found) -> io::Result<()> {
    netlink.write_all(&request(SOCK_DESTROY, NLM_F_ACK, found.family, &found.id))?;
    let mut block = [0; 4096];
    let count = netlink.read(&mut block)?;
    match messages(&block[..count]).next() {
        Some((NLMSG_ERROR, body)) => error(body),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A netlink header and a `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; SOCKID]) -> Vec<u8> {
    let body = [&[family, libc::IPPROTO_TCP as u8, 0, 0][..], &CONNECTED.to_ne_bytes(), id].concat();
    let length = ((NLMSG_HEADER + body.len()) as u32).to_ne_bytes();
    let flags = (NLM_F_REQUEST | flags).to_ne_bytes();
    // Sequence number and port are zero: there is one request at a time, and the kernel knows us.
    [&length[..], &kind.to_ne_bytes(), &flags, &[0; 8], &body].concat()
}

/// The messages in a datagram: type and body.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = datagram.first_chunk::<NLMSG_HEADER>()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let body = datagram.get(NLMSG_HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([header[4], header[5]]), body))
    })
}

/// An acknowledgement, which is an error of 0, or an error.
fn error(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A `struct inet_diag_msg`.
fn parse(body: &[u8]) -> Option<Found> {
    let (family, state) = (*body.first()?, *body.get(1)?);
    let id = body.get(SOCKID_AT..)?.first_chunk::<SOCKID>()?;
    let local = SocketAddr::new(address(family, &id[4..20])?, u16::from_be_bytes([id[0], id[1]]));
    let peer = SocketAddr::new(address(family, &id[20..36])?, u16::from_be_bytes([id[2], id[3]]));
    Some(Found { family, id: *id, socket: TcpSocket { local, peer, state } })
}

fn address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => ip(4, bytes),
        libc::AF_INET6 => ip(6, bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Port 22 of 10.0.0.2, connected with port 40000 of 10.0.0.1.
    fn established() -> Vec<u8> {
        let mut body = vec![libc::AF_INET as u8, 1, 0, 0, 0, 22, 0x9c, 0x40];
        body.extend([10, 0, 0, 2].iter().chain(&[0; 12]).chain(&[10, 0, 0, 1]).chain(&[0; 12]));
        body.extend([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        body.extend([0; 20]);
        body
    }

    #[test]
    fn a_request_has_the_length_that_it_says() {
        let request = request(SOCK_DESTROY, NLM_F_ACK, 2, &[9; SOCKID]);
        assert_eq!(request.len(), 16 + 56);
        let (kind, body) = messages(&request).next().unwrap();
        assert_eq!(
            (kind, body.len(), &body[..2], &body[8..]),
            (SOCK_DESTROY, 56, &[2, 6][..], &[9; SOCKID][..])
        );
    }

    #[test]
    fn a_connection_is_read_with_its_cookie() {
        let found = parse(&established()).unwrap();
        assert_eq!(found.socket.local, "10.0.0.2:22".parse().unwrap());
        assert_eq!(found.socket.peer, "10.0.0.1:40000".parse().unwrap());
        assert_eq!((found.socket.state, &found.id[40..]), (1, &[1, 2, 3, 4, 5, 6, 7, 8][..]));
        assert!(parse(&established()[..50]).is_none());
    }

    #[test]
    fn messages_of_wrong_lengths_end_a_datagram() {
        let mut datagram = request(SOCK_DIAG_BY_FAMILY, 0, 2, &[0; SOCKID]);
        assert_eq!(messages(&datagram).count(), 1);
        for length in [0_u32, 15, 73, u32::MAX] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
    }

    #[test]
    fn connections_within_the_machine_are_left_alone() {
        let to = |local: &str, peer: &str| {
            let (local, peer) = (local.parse().unwrap(), peer.parse().unwrap());
            leaves_this_machine(&TcpSocket { local, peer, state: 1 })
        };
        assert!(to("10.0.0.2:22", "10.0.0.1:40000"));
        assert!(to("[2001:db8::2]:22", "[2001:db8::1]:40000"));
        assert!(!to("127.0.0.1:1", "127.0.0.1:2"));
        assert!(!to("10.0.0.2:1", "10.0.0.2:2"));
        assert!(!to("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.2]:2"));
    }

    #[test]
    fn an_error_is_told_by_its_number() {
        assert!(error(&0_i32.to_ne_bytes()).is_ok());
        assert_eq!(error(&(-2_i32).to_ne_bytes()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
