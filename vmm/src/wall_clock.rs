//! `vmm restore --time step`: the guest's agent sets the guest's wall clock.
//!
//! In: where the guest's vsock device is. Out: the agent asked, and one line that says what became of the clock. Holds: nobody
//! waits for the guest; it is asked when it runs, by a thread of its own.

use crate::complaint;
use agent::{Client, ClientError};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

/// How long the agent may take to answer; a busy guest is slow.
const PATIENCE: Duration = Duration::from_secs(10);
/// A connection may be lost while the guest hears that its old ones are gone.
const TRIES: usize = 10;
const PAUSE: Duration = Duration::from_millis(200);

/// Has the agent set the clock, if there is a way to it. The guest has just been let run.
pub fn step(vsock: Option<PathBuf>) {
    let Some(path) = vsock else { return left("it has no vsock device") };
    let asked = thread::Builder::new().name("wall clock".to_owned()).spawn(move || match ask(&path) {
        Ok(()) => complaint::say("vmm: --time step: the guest's agent has set its wall clock"),
        Err(error) => left(&complaint::one_line(&error)),
    });
    if let Err(error) = asked {
        left(&error.to_string());
    }
}

fn ask(vsock: &Path) -> Result<(), ClientError> {
    let client = Client::new(vsock, PATIENCE);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let set = || client.set_clock(now);
    for _ in 1..TRIES {
        match set() {
            Err(ClientError::NoAgent | ClientError::Lost | ClientError::Io(_)) => thread::sleep(PAUSE),
            done => return done,
        }
    }
    set()
}

fn left(why: &str) {
    complaint::say(&format!(
        "vmm: --time step: nobody set the guest's wall clock ({why}): it has to do so from its RTC, which tells the host's time"
    ));
}
