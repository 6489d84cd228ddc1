//! A bar for a snapshot that the VM's process writes.
//!
//! In: the VM's API socket, and the call that asks for the snapshot. Out: that call's result; meanwhile a bar on standard error. Holds: without a terminal
//! nobody asks for anything more, and what goes wrong with the bar is no error.

use crate::api::{Command, Reply};
use crate::client;
use crate::inspect::progress_bar;
use std::io::{IsTerminal, stderr};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, Builder};
use std::time::Duration;

/// How often it is drawn.
const LOOK: Duration = Duration::from_millis(100);

/// Makes the call, with the bar if there is a terminal for it.
pub fn beside<T>(socket: &Path, call: impl FnOnce() -> T) -> T {
    if !stderr().is_terminal() {
        return call();
    }
    thread::scope(|scope| {
        let (_until_then, over) = channel();
        // Without a thread there is no bar.
        let _ = Builder::new().name("bar".to_owned()).spawn_scoped(scope, move || draw(socket, &over));
        call()
    })
}

/// Until the other end of the channel is dropped.
fn draw(socket: &Path, over: &Receiver<()>) {
    let bar = progress_bar("writing", 0);
    while over.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
        // A VM of an older version can't tell.
        let Ok(Reply::Progress(saved)) = client::call(socket, &Command::Progress) else { continue };
        if saved.total_bytes > 0 {
            bar.set_length(saved.total_bytes);
            bar.set_position(saved.done_bytes);
        }
    }
    bar.finish_and_clear();
}
