//! What needs no tap; the rest is told by stories in the lab.

use super::*;
use std::os::unix::net::UnixDatagram;

/// A socket in a tap's place: it gives and takes whole frames too.
fn wire() -> (Tap, UnixDatagram, Epoll) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let tap = Tap::on(File::from(OwnedFd::from(near))).unwrap();
    let outer = Epoll::new().unwrap();
    let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 7);
    outer.ctl(ControlOperation::Add, tap.fd().as_raw_fd(), edge).unwrap();
    (tap, far, outer)
}

fn told(outer: &Epoll) -> bool {
    outer.wait(0, &mut [EpollEvent::default(); 4]).unwrap() > 0
}

#[test]
fn each_frame_is_told_of() {
    let (mut tap, far, outer) = wire();
    assert!(!told(&outer));
    for round in 0..3 {
        far.send(&[round; 60]).unwrap();
        assert!(told(&outer), "round {round}");
        tap.seen();
        let mut frame = [0; 100];
        assert_eq!(tap.receive(&mut frame).unwrap(), 60);
        assert_eq!(tap.receive(&mut frame).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!told(&outer));
    }
}

#[test]
fn another_turn_is_told_of_once() {
    let (mut tap, _far, outer) = wire();
    for _ in 0..3 {
        tap.again();
        assert!(told(&outer));
        tap.seen();
        assert!(!told(&outer));
    }
}

#[test]
fn another_turn_may_be_asked_for_before_the_first_frame_is_taken() {
    let (mut tap, far, outer) = wire();
    far.send(&[1; 60]).unwrap();
    assert!(told(&outer));
    tap.seen();
    tap.again();
    assert!(told(&outer), "though the frame still waits");
}

#[test]
fn room_is_told_of_when_there_was_none() {
    let (mut tap, far, outer) = wire();
    let mut sent = 0;
    while tap.send(&[1; 60]).is_ok() {
        sent += 1;
        assert!(sent < 100_000, "always room");
    }
    while told(&outer) {
        tap.seen();
    }
    while far.recv(&mut [0; 100]).is_ok() {}
    assert!(told(&outer));
    tap.seen();
    tap.send(&[1; 60]).unwrap();
}

#[test]
fn what_no_interface_is_called_is_refused() {
    for name in ["", ".", "..", "a/b", "tap 0", "tap%d", "eth0:1", "abcdefghijklmnop", "tap\n0", "täp"] {
        assert!(TapName::interface(name).is_err(), "{name}");
    }
    assert_eq!(TapName::interface("tap0").unwrap(), TapName::Interface("tap0".to_owned()));
}

#[test]
fn a_descriptor_of_something_else_is_refused() {
    let null = File::open("/dev/null").unwrap();
    for fd in [null.as_raw_fd(), -1, 99_999] {
        let refused = Tap::open(&TapName::Descriptor(fd)).err().unwrap();
        assert_eq!(refused.to_string(), format!("file descriptor {fd} is no tap"));
    }
}
