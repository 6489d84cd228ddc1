//! The server and the client against each other, with a loop that stands for the machine's.

use super::*;
use crate::api::{KernelList, RunState, SnapshotSummary, Status, StopRequest, Then};
use crate::client::{self, ClientError};
use crate::disk::DiskCare;
use crate::progress::SavedSoFar;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Instant;

struct Served {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    server: ApiServer,
    calls: Receiver<ApiCall>,
    wake: EventFd,
}

fn served() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let wake = EventFd::new(libc::EFD_CLOEXEC).unwrap();
    let (sender, calls) = channel();
    let server = ApiServer::start(&socket, sender, wake.try_clone().unwrap()).unwrap();
    Served { _directory: directory, socket, server, calls, wake }
}

fn status(state: RunState) -> Status {
    Status {
        name: "a\x1b[31mb".into(),
        state,
        vcpus: 2,
        memory_bytes: 64 << 20,
        kernel: Some("6.1".into()),
        started_from: "/k".into(),
        balloon: None,
        uptime_seconds: 0.25,
        pid: 1,
        version: "0".into(),
        vsock: None,
        networks: Vec::new(),
    }
}

/// Answers calls as a machine would, until it is stopped.
fn play_machine(served: Served) {
    let mut state = RunState::Running;
    loop {
        served.wake.read().unwrap();
        for call in served.calls.try_iter() {
            let stop = matches!(call.command, Command::Stop(_));
            let _ = call.reply.send(act(&mut state, call.command));
            if stop {
                return;
            }
        }
    }
}

fn act(state: &mut RunState, command: Command) -> Result<Reply, ApiError> {
    match command {
        Command::Status => return Ok(Reply::Status(status(*state))),
        Command::Progress => unreachable!("the server answers it"),
        Command::Pause => *state = RunState::Paused,
        Command::Resume => *state = RunState::Running,
        Command::Kernels => return Ok(Reply::Kernels(KernelList { kernels: Vec::new() })),
        Command::Stop(_)
        | Command::Balloon(_)
        | Command::Switch(_)
        | Command::Forget(_)
        | Command::Prepare(_)
        | Command::Accept
        | Command::Dump(_) => {}
        Command::Snapshot(request) if request.path.ends_with("full") => {
            return Err(ApiError::failed("no space left"));
        }
        Command::Snapshot(request) => {
            let path = request.path;
            let pause_ms = (request.then != Some(Then::Pause)).then_some(3.0);
            let (memory_bytes, stored_bytes, total_ms) = (64 << 20, 1 << 20, 4.0);
            return Ok(Reply::Snapshot(SnapshotSummary {
                path,
                memory_bytes,
                stored_bytes,
                vmcoreinfo: false,
                pause_ms,
                total_ms,
            }));
        }
    }
    Ok(Reply::Done)
}

fn with_machine(test: impl FnOnce(&Path)) {
    let served = served();
    let socket = served.socket.clone();
    let machine = std::thread::spawn(|| play_machine(served));
    test(&socket);
    assert_eq!(client::call(&socket, &Command::Stop(StopRequest::default())).unwrap(), Reply::Done);
    machine.join().unwrap();
    assert!(!socket.exists());
    assert!(matches!(client::call(&socket, &Command::Status), Err(ClientError::NoSocket(_))));
}

fn printed(socket: &Path, command: &Command, json: bool) -> String {
    let mut out = Vec::new();
    client::run(socket, command, json, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn state(socket: &Path) -> RunState {
    match client::call(socket, &Command::Status).unwrap() {
        Reply::Status(status) => status.state,
        other => panic!("not a status: {other:?}"),
    }
}

#[test]
fn the_verbs_reach_the_machine_and_its_answers_come_back() {
    with_machine(|socket| {
        assert_eq!(state(socket), RunState::Running);
        assert_eq!(printed(socket, &Command::Pause, false), "paused\n");
        assert_eq!(state(socket), RunState::Paused);
        assert_eq!(printed(socket, &Command::Resume, true), "{\"done\":\"resumed\"}\n");
        assert_eq!(state(socket), RunState::Running);
    });
}

#[test]
fn a_name_cannot_speak_to_the_terminal() {
    with_machine(|socket| {
        let text = printed(socket, &Command::Status, false);
        assert!(text.starts_with("name     a\u{fffd}[31mb\nstate    running\nvcpus    2\n"), "{text:?}");
        let json: Status = serde_json::from_str(&printed(socket, &Command::Status, true)).unwrap();
        assert_eq!(json, status(RunState::Running));
    });
}

#[test]
fn a_snapshot_path_is_made_absolute_and_a_failure_is_told() {
    with_machine(|socket| {
        let here = std::env::current_dir().unwrap().join("a.snap");
        let command =
            client::snapshot(Path::new("a.snap"), None, DiskCare::default(), (None, None), false).unwrap();
        let Reply::Snapshot(summary) = client::call(socket, &command).unwrap() else { panic!("no summary") };
        assert_eq!(summary.path, here);
        assert!(printed(socket, &command, false).contains("1.0 MiB of 64.0 MiB"));

        let command =
            client::snapshot(Path::new("/full"), Some(Then::Stop), DiskCare::default(), (None, None), false)
                .unwrap();
        let error = client::call(socket, &command).unwrap_err();
        assert_eq!(error.to_string(), "no space left");
    });
}

#[test]
fn a_path_that_is_not_utf_8_is_refused_before_it_is_sent() {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::OsStr::from_bytes(b"/tmp/\xff");
    let command = client::snapshot(Path::new(path), None, DiskCare::default(), (None, None), false).unwrap();
    let error = client::call(Path::new("/nonexistent"), &command).unwrap_err();
    assert!(matches!(error, ClientError::Path { .. }), "{error}");
}

/// Sends raw bytes, and returns all that comes back until the server closes the connection.
fn raw(socket: &Path, bytes: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn other_programs_get_http_and_json_errors() {
    with_machine(|socket| {
        let answer = raw(socket, "GET /x HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n{\"error\":\"no such path: /x\"}"), "{answer}");
        let answer = raw(socket, "PUT /api/v1/vm.pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 501 "), "{answer}");
        let answer = raw(socket, "nonsense\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    });
}

#[test]
fn a_connection_serves_several_requests() {
    with_machine(|socket| {
        let one = "GET /api/v1/vm.info HTTP/1.1\r\n\r\n";
        let last = "PUT /api/v1/vm.pause HTTP/1.0\r\n\r\n";
        let answer = raw(socket, &format!("{one}{one}{last}"));
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2);
        assert_eq!(answer.matches("HTTP/1.1 204 No Content").count(), 1);
    });
}

#[test]
fn connections_are_limited_and_their_places_come_free() {
    with_machine(|socket| {
        let held: Vec<UnixStream> =
            (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(socket).unwrap()).collect();
        let error = client::call(socket, &Command::Status).unwrap_err();
        assert!(error.to_string().contains("connections already"), "{error}");
        drop(held);
        let begun = Instant::now();
        while client::call(socket, &Command::Status).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

#[test]
fn a_machine_that_ends_without_answering_says_so() {
    let served = served();
    let socket = served.socket.clone();
    let asking = std::thread::spawn(move || client::call(&socket, &Command::Pause));
    served.wake.read().unwrap();
    drop(served.calls);
    let error = asking.join().unwrap().unwrap_err();
    assert!(matches!(&error, ClientError::Refused(message) if message == "the VM is ending"), "{error}");
}

#[test]
fn idle_connections_do_not_delay_the_end() {
    let served = served();
    let _idle = UnixStream::connect(&served.socket).unwrap();
    while served.server.shared.open().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    drop(served.server);
    assert!(begun.elapsed() < LAST_WORDS);
}

#[test]
fn a_socket_nobody_listens_on_is_told_from_none() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("dead.sock");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(matches!(client::call(&socket, &Command::Status), Err(ClientError::NobodyThere(_))));
}

#[test]
fn another_kind_of_server_is_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("other.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH\r\n").unwrap();
        let _ = stream.read(&mut [0; 512]);
    });
    let error = client::call(&socket, &Command::Status).unwrap_err();
    assert!(matches!(error, ClientError::NotTheApi { .. }), "{error}");
    other.join().unwrap();
}

#[test]
fn progress_is_told_while_the_machine_is_busy() {
    // Nobody takes calls.
    let served = served();
    let asked = || client::call(&served.socket, &Command::Progress).unwrap();
    assert_eq!(asked(), Reply::Progress(SavedSoFar::default()));
    served.server.progress().note(3 << 20, 8 << 20);
    assert_eq!(asked(), Reply::Progress(SavedSoFar { done_bytes: 3 << 20, total_bytes: 8 << 20 }));
    served.server.progress().end();
    assert_eq!(asked(), Reply::Progress(SavedSoFar::default()));
}
