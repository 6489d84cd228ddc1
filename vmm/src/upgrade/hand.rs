//! The hand in a guest that stops its processes, writes them down, and brings them back: `vmm-checkpoint`, by way of the agent.
//!
//! In: a verb. Out: what it said of its work, or the line by which it says why not. Holds: no verb is waited for longer than its limit, and
//! whatever a guest prints takes a bounded place.

use super::UpgradeError;
use crate::checkpointer::{self, KEPT, PROGRAM};
use crate::tail::Tail;
use agent::{Client, Ended, Streams};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How long an agent may take to answer, before it is asked again.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often an agent that does not answer is asked.
const RETRY: Duration = Duration::from_millis(50);

/// A guest with an agent.
pub(super) struct Hand {
    /// The Unix socket of its vsock device.
    socket: PathBuf,
}

/// What a verb said.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// How long it took.
    pub(super) took: Duration,
    /// `key=value` pairs of its last line.
    pub(super) values: BTreeMap<String, String>,
}

impl Hand {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Waits until the agent answers. `gone` tells why it never will.
    ///
    /// # Errors
    /// It has gone, or the time is up.
    pub(super) fn wait(
        &self,
        phase: &'static str,
        limit: Duration,
        gone: impl Fn() -> Option<String>,
    ) -> Result<Duration, UpgradeError> {
        let started = Instant::now();
        loop {
            let Err(silent) = Client::new(&self.socket, PATIENCE.min(limit)).greets() else {
                return Ok(started.elapsed());
            };
            if let Some(why) = gone() {
                return Err(UpgradeError::Phase { phase, why });
            }
            if started.elapsed() >= limit {
                let why = format!("its agent does not answer within {} s: {silent}", limit.as_secs());
                return Err(UpgradeError::Phase { phase, why });
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Runs the verb to its end.
    ///
    /// # Errors
    /// It fails, can't be run, or the time is up; it is named as the phase that it is.
    pub(super) fn ask(
        &self,
        verb: &'static str,
        options: &[&str],
        limit: Duration,
    ) -> Result<Said, UpgradeError> {
        let started = Instant::now();
        let failed = |why: String| UpgradeError::Phase { phase: verb, why };
        let words = [&[PROGRAM, verb], options].concat();
        let (ended, out, err) = command(&self.socket, &words, limit).map_err(failed)?;
        if let Some(why) = checkpointer::failure(ended, &err) {
            return Err(failed(why));
        }
        let line = out.last_line().unwrap_or_default();
        let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
        let values = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Ok(Said { took: started.elapsed(), values })
    }
}

/// In a thread of its own: a guest that hangs while a command runs would be waited for without end. The command is killed when that
/// thread's connection goes, with this process.
fn command(socket: &Path, words: &[&str], limit: Duration) -> Result<(Ended, Tail, Tail), String> {
    let client = Client::new(socket, limit);
    let words: Vec<_> = words.iter().map(std::ffi::OsString::from).collect();
    let (sender, done) = channel();
    let run = move || {
        let (mut out, mut err) = (Tail::of(KEPT), Tail::of(KEPT));
        let streams = Streams { stdin: Box::new(io::empty()), stdout: &mut out, stderr: &mut err };
        let ended = client.exec(&words, streams);
        let _ = sender.send(ended.map(|ended| (ended, out, err)));
    };
    std::thread::Builder::new().name("hand".to_owned()).spawn(run).map_err(|error| error.to_string())?;
    let late = |_| Err(format!("it was not done within {} s", limit.as_secs()));
    match done.recv_timeout(limit).map_or_else(late, Ok)? {
        Ok(done) => Ok(done),
        Err(error) if checkpointer::is_missing(&error) => Err(format!("the guest has no {PROGRAM}")),
        Err(error) => Err(error.to_string()),
    }
}
