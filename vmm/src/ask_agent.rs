//! `vmm agent`: what the guest's agent does besides running commands.
//!
//! In: a wish, and where the guest is. Out: the wish fulfilled, and a line for each connection that was asked about. Holds: it
//! ends within the agent's patience, whatever the guest does.

use crate::cli::AgentVerb;
use crate::exec::{self, ExecError};
use agent::Client;
use agent::message::TcpSocket;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

/// How long the agent may take to answer; a busy guest is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes given to the guest: as many as the key of Linux's generator has.
const SEED: usize = 32;

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The guest can't be reached, or its agent refused.
    #[error(transparent)]
    Guest(#[from] ExecError),
    /// This host has no random bytes.
    #[error("cannot get random bytes for the guest")]
    Random(#[source] io::Error),
    /// The list could not be printed.
    #[error("cannot print the guest's connections")]
    Print(#[source] io::Error),
}

/// Has the guest's agent do it, and prints what it tells.
///
/// # Errors
/// See [`AskError`].
pub fn run(verb: &AgentVerb, out: &mut dyn Write) -> Result<(), AskError> {
    let (AgentVerb::SetClock(guest)
    | AgentVerb::Reseed(guest)
    | AgentVerb::ListTcp(guest)
    | AgentVerb::KillTcp(guest)) = verb;
    let client = Client::new(&exec::vsock(guest)?, PATIENCE);
    let told = match verb {
        AgentVerb::SetClock(_) => client.set_clock(now).map(|()| Vec::new()),
        AgentVerb::Reseed(_) => client.reseed(&seed()?).map(|()| Vec::new()),
        AgentVerb::ListTcp(_) => client.list_tcp(),
        AgentVerb::KillTcp(_) => client.kill_tcp(),
    };
    print(&told.map_err(ExecError::from)?, out).map_err(AskError::Print)
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn seed() -> Result<[u8; SEED], AskError> {
    let mut bytes = [0; SEED];
    // So few bytes come whole or not at all (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|errno| AskError::Random(errno.into()))?;
    Ok(bytes)
}

fn print(sockets: &[TcpSocket], out: &mut dyn Write) -> io::Result<()> {
    sockets.iter().try_for_each(|socket| writeln!(out, "{socket}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::GuestAddress;
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixListener;

    /// An agent on this machine, in the place of a guest's.
    fn guest() -> (tempfile::TempDir, GuestAddress) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map(Result::unwrap) {
                let mut line = String::new();
                BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
                stream.write_all(b"OK 1073741824\n").unwrap();
                agent::server::serve_aside(OwnedFd::from(stream).into());
            }
        });
        (dir, GuestAddress { api: None, vsock: Some(path) })
    }

    #[test]
    fn connections_are_told_a_line_each() {
        let (_dir, guest) = guest();
        let mut told = Vec::new();
        // Whatever connections this machine has; those within it are not among them.
        run(&AgentVerb::ListTcp(guest), &mut told).unwrap();
        let told = String::from_utf8(told).unwrap();
        assert!(told.lines().all(|line| line.split(' ').count() == 3), "{told}");

        let (local, peer) = ("10.0.0.2:22".parse().unwrap(), "[2001:db8::1]:40000".parse().unwrap());
        let mut told = Vec::new();
        print(&[TcpSocket { local, peer, state: 1 }], &mut told).unwrap();
        assert_eq!(told, b"10.0.0.2:22 [2001:db8::1]:40000 established\n");
    }

    #[test]
    fn no_guest_is_told_with_the_socket() {
        let path = std::path::PathBuf::from("/no/such");
        let guest = GuestAddress { api: None, vsock: Some(path) };
        let error = run(&AgentVerb::Reseed(guest), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
