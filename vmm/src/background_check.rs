//! RAM of a snapshot against its digests, while guests run from it.
//!
//! In: a snapshot. Out: nothing, or a line for who has to end them. Holds: the file is read, not a guest's RAM, so that what a guest has
//! written does not matter; everybody else comes first.

use crate::complaint;
use snapshot::Chain;
use std::io;
use std::thread::Builder;

/// The least that a thread can ask for: setpriority(2).
const LAST_OF_ALL: i32 = 19;

/// Reads all of a snapshot's RAM, and of those that it needs, in a thread of its own, at the lowest priority. `damaged` hears of the first chunk that is not what
/// was saved, or can't be read.
///
/// # Errors
/// The host has no thread to give.
pub fn start(chain: Chain, damaged: impl FnOnce(String) + Send + 'static) -> io::Result<()> {
    let check = move || {
        // With the priority of all others it only takes more of their time.
        let _ = rustix::process::setpriority_process(None, LAST_OF_ALL);
        if let Err(error) = chain.verify_ram(&mut |_, _| {}) {
            damaged(complaint::one_line(&error));
        }
    };
    Builder::new().name("verify".to_owned()).spawn(check).map(drop)
}
