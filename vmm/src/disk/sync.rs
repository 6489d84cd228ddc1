//! Making durable what was written to disks.
//!
//! In: a machine's disks. Out: their contents, safe from a power cut. Holds: a disk that has stopped answering is waited for
//! for a bounded time, and then named.

use super::record::{each, io};
use super::{Disk, DisksError};
use std::io;
use std::sync::mpsc::channel;
use std::thread::Builder;
use std::time::Duration;

/// How long a disk may take: gigabytes may be on their way to a slow one.
const PATIENCE: Duration = Duration::from_secs(120);

/// Makes everything that was written to the disks durable, so that snapshot and disks outlive a power cut together.
///
/// # Errors
/// The disk that failed, or that did not do it within two minutes.
pub fn sync(disks: &[Disk]) -> Result<(), DisksError> {
    let writable = disks.iter().filter(|disk| !disk.file.read_only);
    each(writable, |disk| {
        let file = disk.file.file.clone();
        within(PATIENCE, move || file.sync_data()).map_err(io("sync"))
    })
    .map(drop)
}

/// Makes a call that waits for the host, by a thread that is left behind if the call does not end.
fn within(limit: Duration, call: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let (sender, done) = channel();
    Builder::new().name("sync".to_owned()).spawn(move || drop(sender.send(call())))?;
    let late = |_| {
        let text = format!("it was not done within {} s", limit.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    };
    done.recv_timeout(limit).unwrap_or_else(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_hangs_is_waited_for_no_longer_than_it_may() {
        let (let_go, hanging) = channel::<()>();
        let hang = move || {
            let _ = hanging.recv();
            Ok(())
        };
        let error = within(Duration::from_millis(10), hang).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(let_go);
    }

    #[test]
    fn what_the_host_says_is_passed_on() {
        assert!(within(PATIENCE, || Ok(())).is_ok());
        let error = within(PATIENCE, || Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
