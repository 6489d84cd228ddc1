//! `disk-speed DEVICE`: how fast a guest's disk is, past the guest's page cache.
//!
//! In: a block device whose contents don't matter. Out: lines `speed <name> <value>`: MB/s for whole MiB one after another,
//! operations a second for 4 KiB here and there, by one thread and by sixteen. Holds: each takes as long as the others.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WARM_UP: Duration = Duration::from_millis(500);
const TIME: Duration = Duration::from_secs(2);
const LONG: usize = 1 << 20;
const SHORT: usize = 4 << 10;
const THREADS: u64 = 16;

/// Of memory, for `O_DIRECT`.
const ALIGNMENT: usize = 4096;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(device), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: disk-speed DEVICE");
        return ExitCode::from(2);
    };
    match measure(&device) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("disk-speed: {device}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(device: &str) -> io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)?;
    let size = io::Seek::seek(&mut &disk, io::SeekFrom::End(0))?;
    for (name, write) in [("write", true), ("read", false)] {
        let speed = rate(&disk, write, LONG, 1, |_, number| number % (size / LONG as u64))?;
        println!("speed seq-{name} {:.1}", speed * LONG as f64 / 1e6);
        for threads in [1, THREADS] {
            let place = |thread, number| scattered(thread << 32 | number) % (size / SHORT as u64);
            println!("speed rand-{name}-{threads} {:.0}", rate(&disk, write, SHORT, threads, place)?);
        }
    }
    Ok(())
}

/// Operations of `len` bytes a second by so many threads: the `n`th of a thread is at the unit that `place(thread, n)` says.
/// Each thread has a buffer that it has written to before, and a while to warm up.
fn rate(
    disk: &File,
    write: bool,
    len: usize,
    threads: u64,
    place: impl Fn(u64, u64) -> u64 + Sync,
) -> io::Result<f64> {
    let done = AtomicU64::new(0);
    let work = &|thread| -> io::Result<()> {
        let mut buffer = vec![7; len + ALIGNMENT];
        let start = buffer.as_ptr().align_offset(ALIGNMENT);
        let buffer = &mut buffer[start..start + len];
        let began = Instant::now();
        for number in 0.. {
            let passed = began.elapsed();
            if passed >= WARM_UP + TIME {
                break;
            }
            let offset = place(thread, number) * len as u64;
            match write {
                true => disk.write_all_at(buffer, offset)?,
                false => disk.read_exact_at(buffer, offset)?,
            }
            if passed >= WARM_UP {
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
    })?;
    Ok(done.load(Ordering::Relaxed) as f64 / TIME.as_secs_f64())
}

/// A number that looks random: SplitMix64's last steps.
fn scattered(number: u64) -> u64 {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}
