//! How long a guest takes to answer when its snapshot is not in the page cache.
//!
//! In: a directory on a disk. Out: rows: with the working set fetched ahead, and after all of the file was read, beside plain lazy. Holds:
//! the file is dropped from the page cache before each of them, and they take turns.

use super::report::Row;
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Result, ensure};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

const ROUNDS: usize = 7;

/// A guest with 256 MiB in use, which works with 32 MiB of them.
///
/// # Errors
/// A restore fails.
pub fn cold(dir: &Path) -> Result<Vec<Row>> {
    let file = dir.join("scatter.snapshot");
    let guest = Guest::bare("scatter", dir)?.memory("512M").cmdline("size=256 every=8 rate=200");
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&file)?;
    let mut recorded = TestVm::restore_with(&file, &["--record-working-set"])?;
    recorded.wait_for("of working set")?;
    drop(recorded);
    // By default a thread reads the whole file meanwhile, whatever the guest does.
    let (unchecked, checked) = (["--verify", "none"], ["--verify", "lazy"]);
    let (mut lazy, mut fetched, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let (mut lazy_checked, mut fetched_checked) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        lazy.push(answer(&guest, &file, &unchecked, false)?);
        fetched.push(answer(&guest, &file, &[&unchecked[..], &["--prefetch"]].concat(), false)?);
        all.push(answer(&guest, &file, &unchecked, true)?);
        lazy_checked.push(answer(&guest, &file, &checked, false)?);
        fetched_checked.push(answer(&guest, &file, &[&checked[..], &["--prefetch"]].concat(), false)?);
    }
    let row = |what: &str, samples| Row::new(&format!("cold page cache: answer {what}"), "ms", samples);
    Ok(vec![
        row("with --prefetch, beside plain lazy", fetched).beside(&lazy).goal(0.5),
        row("after reading all, beside plain lazy", all).beside(&lazy),
        row("with --prefetch, beside lazy, both with --verify lazy", fetched_checked).beside(&lazy_checked),
    ])
}

/// Milliseconds until the guest has said its second line: a whole round lies before it. With all of the file read first, if so wished.
fn answer(guest: &Guest, file: &Path, arguments: &[&str], read_all: bool) -> Result<f64> {
    drop_from_cache(file)?;
    let began = Instant::now();
    if read_all {
        io::copy(&mut File::open(file)?, &mut io::sink())?;
    }
    let mut vm = TestVm::restore_with(file, arguments)?;
    for _ in 0..2 {
        let line = vm.next_line(began + LIMIT)?;
        ensure!(line.contains(guest.pulse), "the guest says: {line}");
    }
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

fn drop_from_cache(file: &Path) -> Result<()> {
    let file = File::open(file)?;
    // SAFETY: the file is open; the call changes nothing but what is in the page cache.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    ensure!(error == 0, "{}", io::Error::from_raw_os_error(error));
    Ok(())
}
