//! Client and agent on this machine: a Unix socket takes the place of vsock, with the same handshake.

use agent::message::{Reply, Request};
use agent::wire::{self, Decoder, MAX_PAYLOAD};
use agent::{Client, ClientError, Ended, Streams, VERSION, server};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(60);

/// A vsock device's Unix socket whose guest does `serve` with each connection to port 1024.
fn backend(serve: impl Fn(UnixStream) + Send + 'static) -> (tempfile::TempDir, Client) {
    backend_with(LONG, serve)
}

fn backend_with(
    patience: Duration,
    serve: impl Fn(UnixStream) + Send + 'static,
) -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            assert_eq!(line(&mut stream), "CONNECT 1024\n");
            stream.write_all(b"OK 1073741824\n").unwrap();
            serve(stream);
        }
    });
    (dir, Client::new(&path, patience))
}

/// Reads no further than the end of the line.
fn line(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut text).unwrap();
    text
}

fn agent() -> (tempfile::TempDir, Client) {
    backend(|stream| server::serve_aside(file(stream)))
}

fn file(stream: UnixStream) -> File {
    File::from(OwnedFd::from(stream))
}

fn words(command: &[&str]) -> Vec<OsString> {
    command.iter().map(OsString::from).collect()
}

/// How it ended, and what it printed.
fn exec(
    client: &Client,
    command: &[&str],
    stdin: impl Read + Send + 'static,
) -> Result<(Ended, Vec<u8>, Vec<u8>), ClientError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let streams = Streams { stdin: Box::new(stdin), stdout: &mut stdout, stderr: &mut stderr };
    let ended = client.exec(&words(command), streams)?;
    Ok((ended, stdout, stderr))
}

#[test]
fn a_commands_streams_and_status_come_back() {
    let (_dir, client) = agent();
    let (ended, stdout, stderr) =
        exec(&client, &["sh", "-c", "cat; echo \"$1\" >&2; exit 7", "x", "a b"], &b"input"[..]).unwrap();
    assert_eq!((ended, &stdout[..], &stderr[..]), (Ended::Exited(7), &b"input"[..], &b"a b\n"[..]));
}

#[test]
fn a_signal_is_told_from_a_status() {
    let (_dir, client) = agent();
    let (ended, ..) = exec(&client, &["sh", "-c", "kill -TERM $$"], io::empty()).unwrap();
    assert_eq!(ended, Ended::Signalled(15));
}

#[test]
fn megabytes_go_both_ways_at_once() {
    let (_dir, client) = agent();
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (ended, stdout, _) = exec(&client, &["cat"], io::Cursor::new(input.clone())).unwrap();
    assert_eq!(ended, Ended::Exited(0));
    assert!(stdout == input, "{} bytes came back of {}", stdout.len(), input.len());
}

#[test]
fn a_command_need_not_read_its_input() {
    let (_dir, client) = agent();
    let (ended, stdout, _) = exec(&client, &["echo", "done"], io::repeat(b'x')).unwrap();
    assert_eq!((ended, &stdout[..]), (Ended::Exited(0), &b"done\n"[..]));
    let (ended, ..) = exec(&client, &["sh", "-c", "exec <&-; exit 3"], io::repeat(b'x')).unwrap();
    assert_eq!(ended, Ended::Exited(3));
}

#[test]
fn a_process_left_behind_does_not_hold_up_the_end() {
    let (_dir, client) = agent();
    let (ended, stdout, _) = exec(&client, &["sh", "-c", "sleep 1000 & echo $!"], io::empty()).unwrap();
    assert_eq!(ended, Ended::Exited(0));
    let pid = String::from_utf8(stdout).unwrap().trim().to_owned();
    assert!(alive(&pid), "it goes on without the client");
    assert!(std::process::Command::new("kill").arg(&pid).status().unwrap().success());
}

#[test]
fn what_cannot_be_run_is_told_with_its_errno() {
    let (_dir, client) = agent();
    for (command, errno) in [("/no/such/program", libc::ENOENT), ("/etc/passwd", libc::EACCES)] {
        match exec(&client, &[command], io::empty()) {
            Err(ClientError::Refused(complaint)) => {
                assert_eq!(complaint.errno, errno, "{complaint:?}");
                assert!(complaint.text.starts_with(&format!("cannot run {command}: ")), "{complaint:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_client_that_goes_away_takes_its_command_with_it() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let served = std::thread::spawn(move || server::serve(file(theirs)));
    let mut client = ours;
    let mut frames = Decoder::default();
    let hello = frames.receive(&mut client).unwrap().unwrap();
    assert_eq!(Reply::decode(hello).unwrap(), Reply::Hello(VERSION));
    // The pipeline's second half holds no pipe of ours; only the process group knows it.
    let command = words(&["sh", "-c", "sleep 1000 >/dev/null 2>&1 </dev/null & echo $!; wait"]);
    wire::send(&mut client, &Request::Exec(command).frame()).unwrap();
    let Reply::Stdout(pid) = Reply::decode(frames.receive(&mut client).unwrap().unwrap()).unwrap() else {
        panic!("not output")
    };
    let pid = String::from_utf8(pid).unwrap().trim().to_owned();
    assert!(alive(&pid));
    drop(client);
    served.join().unwrap();
    wait_until(|| !alive(&pid));
}

#[test]
fn a_command_that_reads_nothing_is_killed_as_well() {
    let (mut client, theirs) = UnixStream::pair().unwrap();
    let served = std::thread::spawn(move || server::serve(file(theirs)));
    wire::send(&mut client, &Request::Exec(words(&["sleep", "1000"])).frame()).unwrap();
    client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // More than all buffers on the way hold.
    while wire::send(&mut client, &Request::Stdin(vec![0; MAX_PAYLOAD]).frame()).is_ok() {}
    drop(client);
    served.join().unwrap();
}

#[test]
fn an_agent_that_is_sent_nonsense_says_so_and_hangs_up() {
    let long = [(MAX_PAYLOAD as u32 + 1).to_le_bytes(), 1_u32.to_le_bytes()].concat();
    let strange = [0_u32.to_le_bytes(), 99_u32.to_le_bytes()].concat();
    let twice = [Request::ListTcp, Request::Stdin(vec![])].map(|request| {
        let mut bytes = Vec::new();
        wire::send(&mut bytes, &Request::Exec(words(&["sleep", "1000"])).frame()).unwrap();
        wire::send(&mut bytes, &Request::Stdin(vec![]).frame()).unwrap();
        wire::send(&mut bytes, &request.frame()).unwrap();
        bytes
    });
    for nonsense in [long, strange].into_iter().chain(twice) {
        let (mut client, theirs) = UnixStream::pair().unwrap();
        let served = std::thread::spawn(move || server::serve(file(theirs)));
        client.write_all(&nonsense).unwrap();
        let mut frames = Decoder::default();
        let mut last = None;
        while let Some(frame) = frames.receive(&mut client).unwrap() {
            last = Some(Reply::decode(frame).unwrap());
        }
        assert!(matches!(last, Some(Reply::Failed(_))), "{last:?}");
        served.join().unwrap();
    }
}

#[test]
fn a_client_survives_a_guest_that_sends_nonsense() {
    let hello = Reply::Hello(VERSION).frame();
    let mut greeted = Vec::new();
    wire::send(&mut greeted, &hello).unwrap();
    let with = |rest: &[u8]| [&greeted[..], rest].concat();
    let cases = [
        (with(&u32::MAX.to_le_bytes()), "at most 65536 are allowed"),
        (with(&[0, 0, 0, 0, 99, 0, 0, 0]), "of kind 99"),
        (with(&greeted), "of kind 16 came where it means nothing"),
        (with(b""), "was lost"),
        (vec![4, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0], "its version is 2"),
    ];
    for (answer, expected) in cases {
        let (_dir, client) = backend(move |mut stream| {
            stream.write_all(&answer).unwrap();
            let _ = Decoder::default().receive(&mut stream);
        });
        let error = client.list_tcp().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}

#[test]
fn a_guest_that_says_nothing_costs_the_patience_and_no_more() {
    let kept = std::sync::Mutex::new(Vec::new());
    let (_dir, client) =
        backend_with(Duration::from_millis(50), move |stream| kept.lock().unwrap().push(stream));
    assert!(matches!(client.set_clock(|| unreachable!("it did not answer")), Err(ClientError::TimedOut(_))));
}

#[test]
fn a_guest_that_trickles_is_not_waited_for_longer() {
    let (_dir, client) = backend_with(Duration::from_millis(200), |mut stream| {
        let socket = Reply::Socket(
            "1.2.3.4:5"
                .parse()
                .map(|end| agent::message::TcpSocket { local: end, peer: end, state: 1 })
                .unwrap(),
        );
        std::thread::spawn(move || {
            let _ = wire::send(&mut stream, &Reply::Hello(VERSION).frame());
            while wire::send(&mut stream, &socket.frame()).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    });
    assert!(matches!(client.list_tcp(), Err(ClientError::TimedOut(_))));
}

#[test]
fn a_missing_socket_and_a_missing_agent_are_told_apart() {
    let client = Client::new(Path::new("/no/such/vsock"), LONG);
    let error = client.list_tcp().unwrap_err().to_string();
    assert!(error.starts_with("no vsock socket at /no/such/vsock: the VM may have ended"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    // A device whose guest refuses the connection reads the line and closes.
    std::thread::spawn(move || drop(line(&mut listener.accept().unwrap().0)));
    let error = Client::new(&path, LONG).list_tcp().unwrap_err();
    assert!(matches!(error, ClientError::NoAgent), "{error}");
}

#[test]
fn the_kernel_tells_of_connections() {
    let (_dir, client) = agent();
    // All of this machine's own are left out, so there may be none.
    client.list_tcp().unwrap();
}

fn alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie that nobody has waited for yet is dead.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "it never comes true");
        std::thread::sleep(Duration::from_millis(5));
    }
}
