//! A command of the client's, with its three streams.
//!
//! In: a command line, and frames with its input. Out: frames with its output, and how it ended. Holds: the command has a
//! process group of its own, which is killed if the client goes away before the command has ended; at most one frame of input
//! is kept, so a command that doesn't read stops the client, not the agent.

use crate::message::{Complaint, Reply, Request};
use crate::wire::{self, Decoder, WireError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};

/// What a pipe holds by default, see pipe(7): what a command wrote before it ended is not more.
const PIPE: usize = 64 << 10;

/// Runs the command and tells the client all about it.
///
/// # Errors
/// The client went away, or sent something else than input; the command has been killed.
pub fn run(command: &[OsString], client: &mut File, frames: &mut Decoder) -> Result<(), WireError> {
    let mut job = match Job::start(command) {
        Ok(job) => job,
        Err(e) => return wire::send(client, &cannot_run(command, &e).frame()),
    };
    loop {
        job.input.take(frames)?;
        let ready = job.wait(client)?;
        if ready.hangup {
            return Err(WireError::CutOff);
        }
        if ready.client && frames.fill(client)? == 0 {
            return Err(WireError::CutOff);
        }
        if ready.stdin {
            job.input.give();
        }
        pump(&mut job.stdout, ready.stdout, client, Reply::Stdout)?;
        pump(&mut job.stderr, ready.stderr, client, Reply::Stderr)?;
        if ready.ended {
            return job.finish(client);
        }
    }
}

fn cannot_run(command: &[OsString], error: &io::Error) -> Reply {
    let name = command[0].to_string_lossy();
    let text = format!("cannot run {name}: {error}");
    Reply::Failed(Complaint { errno: error.raw_os_error().unwrap_or(0), text })
}

/// A running command. Dropped before it has ended, it is killed with its process group.
struct Job {
    child: Child,
    /// Readable when the command has ended.
    ended: OwnedFd,
    input: Input,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    reaped: bool,
}

/// What there is to do.
struct Ready {
    hangup: bool,
    client: bool,
    ended: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Job {
    fn start(command: &[OsString]) -> io::Result<Job> {
        let mut program = Command::new(&command[0]);
        program.args(&command[1..]).process_group(0);
        program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn()?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let ended = ended.inspect_err(|_| drop(child.kill().and_then(|()| child.wait())))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let input = Input { pipe: stdin, pending: Vec::new(), ended: false };
        let job = Job { child, ended, input, stdout, stderr, reaped: false };
        job.unblock()?;
        Ok(job)
    }

    /// Our ends of the pipes never block.
    fn unblock(&self) -> io::Result<()> {
        let pipes = [fd(&self.input.pipe), fd(&self.stdout), fd(&self.stderr)];
        Ok(pipes.into_iter().flatten().try_for_each(|pipe| ioctl_fionbio(pipe, true))?)
    }

    /// Waits until there is something to do.
    fn wait(&self, client: &File) -> io::Result<Ready> {
        // Without anything to write, a closed stdin would be reported for ever. What is not waited for is polled as the
        // process, without an event.
        let stdin = fd(&self.input.pipe).filter(|_| !self.input.pending.is_empty());
        let (stdout, stderr) = (fd(&self.stdout), fd(&self.stderr));
        let of_client = if self.input.pending.is_empty() { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(client, of_client | PollFlags::RDHUP),
            PollFd::new(&self.ended, PollFlags::IN),
            self.watch(stdin, PollFlags::OUT),
            self.watch(stdout, PollFlags::IN),
            self.watch(stderr, PollFlags::IN),
        ];
        while let Err(e) = poll(&mut fds, None) {
            if e != Errno::INTR {
                return Err(e.into());
            }
        }
        let seen = fds.map(|fd| fd.revents());
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        Ok(Ready {
            hangup: seen[0].intersects(gone),
            client: seen[0].contains(PollFlags::IN),
            ended: seen[1].contains(PollFlags::IN),
            stdin: stdin.is_some() && !seen[2].is_empty(),
            stdout: stdout.is_some() && !seen[3].is_empty(),
            stderr: stderr.is_some() && !seen[4].is_empty(),
        })
    }

    fn watch<'a>(&'a self, pipe: Option<BorrowedFd<'a>>, flags: PollFlags) -> PollFd<'a> {
        pipe.map_or(PollFd::new(&self.ended, PollFlags::empty()), |pipe| {
            PollFd::from_borrowed_fd(pipe, flags)
        })
    }

    /// Passes on what the command left in its pipes and tells how it ended. A process that it left behind may hold the
    /// pipes open and goes on.
    fn finish(mut self, client: &mut File) -> Result<(), WireError> {
        drain(&mut self.stdout, client, Reply::Stdout)?;
        drain(&mut self.stderr, client, Reply::Stderr)?;
        let status = self.child.wait()?;
        self.reaped = true;
        let reply = match status.signal() {
            Some(signal) => Reply::Signalled(signal as u8),
            // An exit status has eight bits.
            None => Reply::Exited(status.code().unwrap_or_default() as u8),
        };
        wire::send(client, &reply.frame())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.reaped {
            // Its id is its own until it is waited for.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// What the command is to read.
struct Input {
    pipe: Option<ChildStdin>,
    pending: Vec<u8>,
    ended: bool,
}

impl Input {
    /// Takes the next frame when the last one has been written.
    fn take(&mut self, frames: &mut Decoder) -> Result<(), WireError> {
        while self.pending.is_empty() {
            let Some(frame) = frames.take()? else { return Ok(()) };
            match Request::decode(frame)? {
                Request::Stdin(_) if self.ended => {
                    return Err(WireError::Unexpected("input after its end".into()));
                }
                Request::Stdin(bytes) if bytes.is_empty() => (self.ended, self.pipe) = (true, None),
                // A command that has closed its input is not sent any.
                Request::Stdin(bytes) if self.pipe.is_some() => self.pending = bytes,
                Request::Stdin(_) => {}
                _ => return Err(WireError::Unexpected("a second request".into())),
            }
        }
        Ok(())
    }

    /// Writes what fits.
    fn give(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        match pipe.write(&self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => (self.pipe, self.pending) = (None, Vec::new()),
        }
    }
}

fn fd(pipe: &Option<impl AsFd>) -> Option<BorrowedFd<'_>> {
    pipe.as_ref().map(AsFd::as_fd)
}

/// Passes on one piece of output and returns how long it was; the pipe is closed at its end.
fn pump(
    pipe: &mut Option<impl Read>,
    ready: bool,
    client: &mut File,
    reply: fn(Vec<u8>) -> Reply,
) -> Result<usize, WireError> {
    let Some(open) = pipe.as_mut().filter(|_| ready) else { return Ok(0) };
    let mut block = [0; 16 << 10];
    match open.read(&mut block) {
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        Ok(0) | Err(_) => {
            *pipe = None;
            Ok(0)
        }
        Ok(count) => {
            wire::send(client, &reply(block[..count].to_vec()).frame())?;
            Ok(count)
        }
    }
}

/// Passes on what is in a pipe now, and no more than it can hold.
fn drain(
    pipe: &mut Option<impl Read>,
    client: &mut File,
    reply: fn(Vec<u8>) -> Reply,
) -> Result<(), WireError> {
    let mut total = 0;
    while total < PIPE {
        match pump(pipe, true, client, reply)? {
            0 => return Ok(()),
            count => total += count,
        }
    }
    Ok(())
}
