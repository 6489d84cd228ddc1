//! One run of a lab's machine.
//!
//! In: a started emulator and its channel. Out: the command's output, and how it ended. Holds: the emulator is killed
//! when the run ends in whatever way, and the kernel kills it if this process is killed.

use super::stream::Scanner;
use anyhow::{Context, Result};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Exited(u8),
    TimedOut,
    /// The machine gave no sign of life for as long as it was given for one.
    Hung,
    /// The machine ended before the command did.
    Died(ExitStatus),
}

/// How long a run may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Until the command's end; `None` for ever.
    pub(super) command: Option<Duration>,
    /// Until the machine's next sign of life, the first included.
    pub(super) silence: Duration,
}

/// A child that does not outlive this value, nor the thread that started it.
pub(super) struct Emulator(pub(super) Child);

/// A running emulator and the ends of the lab's channel.
pub(super) struct Machine {
    pub(super) emulator: Emulator,
    pub(super) output: Box<dyn Read + Send>,
    /// Stays open and silent, except in an interactive session.
    pub(super) input: Box<dyn Write + Send>,
}

impl Emulator {
    pub(super) fn start(command: &mut Command) -> Result<Emulator> {
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure makes only async-signal-safe calls and allocates nothing.
        unsafe { command.pre_exec(move || die_with(parent)) };
        let program = command.get_program().to_owned();
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Emulator(child))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Either fails only if the child is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has the kernel kill this process when the parent's thread ends; fails if the parent has ended before.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes nothing and cannot fail.
    let now = unsafe { libc::getppid() };
    if now as u32 == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// Passes the output on until the command's status, a limit, or the end of the machine; then kills the machine.
///
/// # Errors
/// `out` fails.
pub(super) fn follow(machine: Machine, token: &str, limits: Limits, out: &mut dyn Write) -> Result<Ending> {
    let Machine { mut emulator, output, input } = machine;
    let end = limits.command.map(|limit| Instant::now() + limit);
    let chunks = chunks(output);
    let mut scanner = Scanner::new(token);
    loop {
        let silent = Instant::now() + limits.silence;
        let until = end.map_or(silent, |end| end.min(silent));
        let Some(chunk) = next(&chunks, until) else {
            return Ok(if until == silent { Ending::Hung } else { Ending::TimedOut });
        };
        if chunk.is_empty() {
            emit(out, &scanner.rest())?;
            drop(input);
            return Ok(Ending::Died(emulator.0.wait()?));
        }
        let (bytes, status) = scanner.push(&chunk);
        emit(out, &bytes)?;
        if let Some(status) = status {
            return Ok(Ending::Exited(status));
        }
    }
}

fn emit(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot pass on the lab's output")
}

/// The next bytes, none at the end of the output; `None` when the deadline has come first.
fn next(chunks: &Receiver<Vec<u8>>, deadline: Instant) -> Option<Vec<u8>> {
    match chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(chunk) => Some(chunk),
        Err(RecvTimeoutError::Disconnected) => Some(Vec::new()),
        Err(RecvTimeoutError::Timeout) => None,
    }
}

/// The output in pieces as they come, read by a thread of its own so that waiting for them can have a limit.
fn chunks(mut output: Box<dyn Read + Send>) -> Receiver<Vec<u8>> {
    let (send, receive) = mpsc::sync_channel(16);
    std::thread::spawn(move || while read_chunk(&mut output, &send) {});
    receive
}

fn read_chunk(output: &mut dyn Read, send: &SyncSender<Vec<u8>>) -> bool {
    let mut chunk = vec![0; 64 << 10];
    match output.read(&mut chunk) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => true,
        Ok(0) | Err(_) => false,
        Ok(len) => {
            chunk.truncate(len);
            send.send(chunk).is_ok()
        }
    }
}

/// Types this process's standard input into the lab until either ends.
pub(super) fn forward_stdin(mut input: Box<dyn Write + Send>) {
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut keys = [0; 1024];
        while let Ok(len @ 1..) = stdin.read(&mut keys) {
            if input.write_all(&keys[..len]).and_then(|()| input.flush()).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a run ends whose machine says nothing.
    fn ending(command: Option<u64>, silence: u64) -> Ending {
        let emulator = Emulator::start(Command::new("sleep").arg("1000")).unwrap();
        let (output, _open) = io::pipe().unwrap();
        let machine = Machine { emulator, output: Box::new(output), input: Box::new(io::sink()) };
        let command = command.map(Duration::from_millis);
        let limits = Limits { command, silence: Duration::from_millis(silence) };
        follow(machine, "token", limits, &mut io::sink()).unwrap()
    }

    #[test]
    fn a_machine_without_a_sign_of_life_hangs_unless_the_command_is_late_before() {
        assert_eq!(ending(None, 20), Ending::Hung);
        assert_eq!(ending(Some(60_000), 20), Ending::Hung);
        assert_eq!(ending(Some(20), 60_000), Ending::TimedOut);
    }
}
