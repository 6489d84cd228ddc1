//! The control API's server: threads of its own between the socket and the machine's loop.
//!
//! In: connections. Out: an [`ApiCall`] in the machine's queue and a tick of its eventfd for each request that is one.
//! Holds: at most [`CONNECTIONS_MAX`] threads, none of which can delay the machine; when the server is dropped, answers
//! on their way are still delivered, within [`LAST_WORDS`].
//!
//! ```text
//! socket ──accept──► connection threads ──ApiCall──► queue + eventfd ──► machine's loop
//!                          ▲                                                  │
//!                          └───────────────── one-shot reply ◄────────────────┘
//! ```

use crate::api::{self, ApiCall, ApiError, Command, Reply};
use crate::http::{Connection, HttpError, Request};
use crate::progress::Progress;
use crate::socket_file::{SocketError, SocketFile};
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// What its socket is called in errors.
const API_SOCKET: &str = "API socket";
/// The most connections at a time.
pub const CONNECTIONS_MAX: usize = 16;
/// How long a request may take to arrive, and a response to be taken.
const MESSAGE_TIME: Duration = Duration::from_secs(5);
/// How long a connection may be silent between requests.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// How long the end of the server waits for answers to be delivered.
pub const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long to wait when the process has no descriptor or thread left.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// The running server. Dropped, it stops, and its socket is removed.
#[derive(Debug)]
pub struct ApiServer {
    file: Option<SocketFile>,
    listener: UnixListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    calls: Mutex<Sender<ApiCall>>,
    wake: EventFd,
    progress: Progress,
    ending: AtomicBool,
    /// A handle of each connection, by which its silence can be ended.
    open: Mutex<HashMap<u64, UnixStream>>,
    closed_one: Condvar,
}

impl ApiServer {
    /// Listens at `path`. Each request goes to `calls`, and then `wake` is written to.
    ///
    /// # Errors
    /// The path can't be a socket's, is taken, or the system has no thread left.
    pub fn start(path: &Path, calls: Sender<ApiCall>, wake: EventFd) -> Result<Self, SocketError> {
        let (file, listener) = SocketFile::listen(API_SOCKET, path)?;
        let refused = |source| SocketError::Io { what: API_SOCKET, path: path.into(), source };
        let shared = Arc::new(Shared {
            calls: Mutex::new(calls),
            wake,
            progress: Progress::default(),
            ending: AtomicBool::new(false),
            open: Mutex::default(),
            closed_one: Condvar::new(),
        });
        let accepting = (listener.try_clone().map_err(refused)?, shared.clone());
        spawn("api", move || accept(&accepting.0, &accepting.1)).map_err(refused)?;
        Ok(Self { file: Some(file), listener, shared })
    }

    /// Where it looks when it is asked how far a snapshot has got, which is no call for the machine's loop.
    pub fn progress(&self) -> Progress {
        self.shared.progress.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.file.take();
        self.shared.ending.store(true, Ordering::SeqCst);
        // SAFETY: a descriptor and a number. This makes a waiting accept return.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        let open = self.shared.open();
        for stream in open.values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let _ = self.shared.closed_one.wait_timeout_while(open, LAST_WORDS, |open| !open.is_empty());
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Has the machine do it. Waits as long as that takes.
    fn call(&self, command: Command) -> Result<Reply, ApiError> {
        let (reply, answer) = channel();
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        calls.send(ApiCall { command, reply }).map_err(|_| ApiError::ending())?;
        self.wake.write(1).map_err(|e| ApiError::failed(format!("cannot wake the machine's loop: {e}")))?;
        answer.recv().unwrap_or_else(|_| Err(ApiError::ending()))
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(body).map(drop)
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for (id, stream) in (0..).zip(listener.incoming()) {
        if shared.is_ending() {
            return;
        }
        if stream.and_then(|stream| admit(id, stream, shared)).is_err() {
            std::thread::sleep(SHORTAGE_PAUSE);
        }
    }
}

fn admit(id: u64, stream: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let mut open = shared.open();
    if open.len() >= CONNECTIONS_MAX {
        drop(open);
        return turn_away(stream);
    }
    open.insert(id, stream.try_clone()?);
    drop(open);
    let entry = Entry { id, shared: shared.clone() };
    spawn("api-connection", move || {
        let _ = serve(stream, &entry.shared);
    })
}

/// A connection's place among the open ones; given up when its thread ends, or could not be started.
struct Entry {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.open().remove(&self.id);
        self.shared.closed_one.notify_all();
    }
}

/// A short answer always fits in a new socket's buffer, so this doesn't wait.
fn turn_away(stream: UnixStream) -> io::Result<()> {
    let message = format!("there are {CONNECTIONS_MAX} connections already");
    let (status, body) = api::response(&Err(ApiError { status: 503, message }));
    Connection::new(stream, MESSAGE_TIME)?.send_response(status, &body, false)
}

fn serve(stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let mut connection = Connection::new(stream, MESSAGE_TIME)?;
    loop {
        let (result, keep_alive) = match connection.request(IDLE_TIME) {
            Ok(Some(request)) => (answer(&request, shared), request.keep_alive),
            Ok(None) | Err(HttpError::Io(_)) => return Ok(()),
            Err(HttpError::Refused { status, message }) => (Err(ApiError { status, message }), false),
            Err(e @ HttpError::TimedOut) => (Err(ApiError { status: 408, message: e.to_string() }), false),
        };
        let keep_alive = keep_alive && !shared.is_ending();
        let (status, body) = api::response(&result);
        connection.send_response(status, &body, keep_alive)?;
        if !keep_alive {
            return Ok(());
        }
    }
}

fn answer(request: &Request, shared: &Shared) -> Result<Reply, ApiError> {
    match api::command(&request.method, &request.path, &request.body)? {
        Command::Progress => Ok(Reply::Progress(shared.progress.now())),
        command => shared.call(command),
    }
}

#[cfg(test)]
mod tests;
