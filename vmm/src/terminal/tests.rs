use super::*;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

fn typed(terminal: bool) -> Terminal {
    let escape = terminal.then(Escape::default);
    Terminal { input: -1, open: true, escape, queue: VecDeque::new() }
}

#[test]
fn plain_bytes_go_to_the_guest() {
    let mut terminal = typed(true);
    assert_eq!(terminal.sort(b"ls\r\x03\x1a"), []);
    assert_eq!(terminal.take(100), b"ls\r\x03\x1a");
}

#[test]
fn escape_sequences_become_actions_and_never_reach_the_guest() {
    let mut terminal = typed(true);
    let actions = terminal.sort(b"a\x01hb\x01s\x01?\x01x");
    assert_eq!(actions, [Action::Help, Action::Status, Action::Help, Action::End]);
    assert_eq!(terminal.take(100), b"ab");
}

#[test]
fn the_escape_key_itself_can_be_sent() {
    let mut terminal = typed(true);
    assert_eq!(terminal.sort(b"\x01\x01x\x01ax"), []);
    assert_eq!(terminal.take(100), b"\x01x\x01x");
}

#[test]
fn an_unknown_sequence_is_dropped_whole() {
    let mut terminal = typed(true);
    assert_eq!(terminal.sort(b"\x01qz"), []);
    assert_eq!(terminal.take(100), b"z");
}

#[test]
fn a_sequence_may_be_split_between_reads() {
    let mut terminal = typed(true);
    assert_eq!(terminal.sort(b"\x01"), []);
    assert_eq!(terminal.sort(b"x"), [Action::End]);
}

#[test]
fn a_pipe_has_no_escape_key() {
    let mut terminal = typed(false);
    assert_eq!(terminal.sort(b"\x01x"), []);
    assert_eq!(terminal.take(100), b"\x01x");
}

#[test]
fn the_guest_takes_as_much_as_it_has_room_for() {
    let mut terminal = typed(true);
    terminal.sort(b"abcdef");
    assert_eq!(terminal.take(4), b"abcd");
    assert_eq!(terminal.take(0), b"");
    assert!(terminal.has_bytes());
    assert_eq!(terminal.take(4), b"ef");
    assert!(!terminal.has_bytes());
}

#[test]
fn the_escape_key_works_while_the_guest_reads_nothing() {
    let mut terminal = typed(true);
    terminal.sort(&[b'x'; 2 * QUEUE_MAX]);
    assert!(terminal.fd().is_some());
    assert_eq!(terminal.sort(b"\x01x"), [Action::End]);
    assert_eq!(terminal.take(usize::MAX).len(), QUEUE_MAX);
}

fn pipe() -> (OwnedFd, std::fs::File) {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills in two descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]).into())
    }
}

#[test]
fn a_pipe_is_read_in_full_however_slow_the_guest_is() {
    let (input, mut writer) = pipe();
    let sent: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
    writer.write_all(&sent).unwrap();
    drop(writer);
    let mut terminal = Terminal::on(input.as_raw_fd()).unwrap();
    let mut received = Vec::new();
    while terminal.open || terminal.has_bytes() {
        terminal.read().unwrap();
        assert!(terminal.queue.len() < QUEUE_MAX + 512);
        received.extend(terminal.take(7));
    }
    assert_eq!(received, sent);
}

#[test]
fn reading_never_waits_and_leaves_the_descriptor_blocking() {
    let (input, writer) = pipe();
    let mut terminal = Terminal::on(input.as_raw_fd()).unwrap();
    assert_eq!(terminal.read().unwrap(), []);
    assert!(terminal.fd().is_some());
    // SAFETY: F_GETFL takes no pointer.
    assert_eq!(unsafe { libc::fcntl(input.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
    drop(writer);
}

#[test]
fn the_end_of_input_only_closes_input() {
    let (input, writer) = pipe();
    drop(writer);
    let mut terminal = Terminal::on(input.as_raw_fd()).unwrap();
    assert_eq!(terminal.read().unwrap(), []);
    assert_eq!(terminal.fd(), None);
    assert_eq!(terminal.read().unwrap(), []);
}

/// Opens a pseudo-terminal: (the end that a person types into, the end that a program sees).
fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
    let (mut person, mut program) = (0, 0);
    use std::ptr::{null, null_mut};
    // SAFETY: openpty fills in two descriptors, which nobody else owns; the other arguments may be null.
    unsafe {
        assert_eq!(libc::openpty(&mut person, &mut program, null_mut(), null(), null()), 0);
        (OwnedFd::from_raw_fd(person), OwnedFd::from_raw_fd(program))
    }
}

#[test]
fn a_terminal_is_raw_while_it_is_held_and_given_back_after() {
    let (person, program) = pseudo_terminal();
    let fd = program.as_raw_fd();
    let before = terminal_mode(fd).unwrap();
    let mut terminal = Terminal::on(fd).unwrap();
    let raw = terminal_mode(fd).unwrap();
    assert_eq!(raw.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
    assert_eq!(raw.c_oflag, before.c_oflag);

    let mut person = std::fs::File::from(person);
    person.write_all(b"\x03\x01x").unwrap();
    assert_eq!(terminal.read().unwrap(), [Action::End]);
    assert_eq!(terminal.take(9), b"\x03");

    drop(terminal);
    let after = terminal_mode(fd).unwrap();
    assert_eq!(
        (after.c_iflag, after.c_lflag, after.c_cflag),
        (before.c_iflag, before.c_lflag, before.c_cflag)
    );
}
