//! The guest's side.
//!
//! In: a connection. Out: the answer to the one request on it. Holds: a client that says nothing is left after
//! [`PATIENCE`]; there are at most [`MOST`] at once.

use crate::message::{Complaint, Reply, Request, TcpSocket};
use crate::wire::{self, Decoder, WireError};
use crate::{VERSION, exec, system, tcp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How long a client may take to say what it wants.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Most clients at once.
pub const MOST: usize = 64;

static CLIENTS: AtomicUsize = AtomicUsize::new(0);

/// Serves a connection on a thread of its own; without one, the connection is closed.
pub fn serve_aside(client: File) {
    let _ = std::thread::Builder::new().spawn(move || serve(client));
}

/// Serves a connection to its end. What fails is told to the client if it is still there; there is nobody else to tell.
pub fn serve(mut client: File) {
    let served = if CLIENTS.fetch_add(1, Ordering::Relaxed) < MOST {
        converse(&mut client)
    } else {
        Err(WireError::Unexpected(format!("it has {MOST} clients already")))
    };
    CLIENTS.fetch_sub(1, Ordering::Relaxed);
    if let Err(e) = served {
        let complaint = Complaint { errno: 0, text: e.to_string() };
        let _ = wire::send(&mut client, &Reply::Failed(complaint).frame());
    }
}

fn converse(client: &mut File) -> Result<(), WireError> {
    wire::send(client, &Reply::Hello(VERSION).frame())?;
    let mut frames = Decoder::default();
    let Some(request) = first_request(client, &mut frames)? else { return Ok(()) };
    let done = match request {
        Request::Exec(command) => return exec::run(&command, client, &mut frames),
        Request::Stdin(_) => return Err(WireError::Unexpected("input without a command".into())),
        Request::SetClock(time) => system::set_clock(time).map(|()| Vec::new()),
        Request::Reseed(random) => system::reseed(&random).map(|()| Vec::new()),
        Request::ListTcp => tcp::list(),
        Request::KillTcp => tcp::kill(),
    };
    answer(client, done)
}

fn answer(client: &mut File, done: io::Result<Vec<TcpSocket>>) -> Result<(), WireError> {
    match done {
        Ok(sockets) => {
            sockets.into_iter().try_for_each(|socket| wire::send(client, &Reply::Socket(socket).frame()))?;
            wire::send(client, &Reply::Done.frame())
        }
        Err(e) => {
            let complaint = Complaint { errno: e.raw_os_error().unwrap_or(0), text: e.to_string() };
            wire::send(client, &Reply::Failed(complaint).frame())
        }
    }
}

/// The first request; none if the client goes without one.
fn first_request(client: &mut File, frames: &mut Decoder) -> Result<Option<Request>, WireError> {
    loop {
        if let Some(frame) = frames.take()? {
            return Request::decode(frame).map(Some);
        }
        let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(client, PollFlags::IN)];
        match poll(&mut fds, Some(&patience)) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) => return Err(WireError::Unexpected(format!("no request within {PATIENCE:?}"))),
            result => result.map_err(io::Error::from)?,
        };
        if frames.fill(client)? == 0 {
            return Ok(None);
        }
    }
}
