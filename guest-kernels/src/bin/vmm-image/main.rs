//! `vmm-image poweroff|return|stub`: what an image kernel's init does for `vmm suspend-with --write-to`. `vmm-image rate` only reads.
//!
//! In: `/proc/vmcore`, which is the machine that sleeps, and the disk with the serial number `image`, which is new and reads as zeroes.
//! Out: the one copied to the other and synced, what that cost in one line, and the machine given up. Holds: what is copied has the
//! digests that the machine's notes say; whatever fails is told in one line with `FAIL`, and the machine that sleeps goes on.

mod vmcore;

use snapshot_format::chunk;
use std::arch::asm;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use vmcore::Vmcore;

/// Its second byte is the control port.
const EXIT_PORT: u16 = 0xf4;
const CONTROL_PORT: u16 = EXIT_PORT + 1;
const RETURN: u8 = 1;
const RESTART: u8 = 2;
const SERIAL: &str = "image";
const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;

fn main() -> ExitCode {
    let then = std::env::args().nth(1);
    let done = match then.as_deref() {
        Some("poweroff") => copy().and_then(|()| power_off()),
        Some("return") => copy().and_then(|()| say(RETURN)),
        Some("stub") => copy().and_then(|()| say(RESTART)),
        Some("rate") => rate(),
        _ => {
            eprintln!("usage: vmm-image poweroff|return|stub|rate");
            return ExitCode::from(2);
        }
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    println!("image FAIL {error}");
    if let Err(error) = say(RETURN) {
        println!("image FAIL to give the machine back: {error}");
    }
    ExitCode::FAILURE
}

fn copy() -> io::Result<()> {
    let booted = first_number("/proc/uptime")?;
    let begun = Instant::now();
    let core = Vmcore::open()?;
    let to = OpenOptions::new().write(true).open(disk()?)?;
    to.write_all_at(core.head(), 0)?;
    let mut written = core.head().len() as u64;
    let digest = core.each_chunk(|at, chunk| {
        written += write_data(&to, at, chunk)?;
        Ok(())
    })?;
    to.sync_all()?;
    let took = begun.elapsed().as_millis();
    let [total, free] = ["MemTotal:", "MemAvailable:"].map(memory);
    let (total, free) = (total?, free?);
    println!(
        "image: {} MiB of {} MiB with digest {digest:016x} written in {took} ms; this kernel has {} MiB, uses {} MiB, and was up after \
         {booted} s",
        written >> 20,
        core.len()? >> 20,
        total >> 10,
        (total - free) >> 10,
    );
    Ok(())
}

/// How long `/proc/vmcore` takes to be read as it is for a copy, and by read(2), all of it.
fn rate() -> io::Result<()> {
    let core = Vmcore::open()?;
    let begun = Instant::now();
    let mut data = 0;
    core.each_chunk(|_, chunk| {
        runs(chunk).filter(|(_, zero)| !zero).for_each(|(run, _)| data += run.len());
        Ok(())
    })?;
    let mapped = begun.elapsed();
    let begun = Instant::now();
    let (mut file, mut piece, mut again) = (core.file(), vec![0; PIECE], 0);
    file.rewind()?;
    loop {
        let len = fill(&mut file, &mut piece)?;
        if len == 0 {
            break;
        }
        runs(&piece[..len]).filter(|(_, zero)| !zero).for_each(|(run, _)| again += run.len());
    }
    let read = begun.elapsed();
    println!(
        "rate: {} MiB of {} MiB found in {} ms; {} MiB by read(2) in {} ms; ratio {:.3}",
        data >> 20,
        core.len()? >> 20,
        mapped.as_millis(),
        again >> 20,
        read.as_millis(),
        mapped.as_secs_f64() / read.as_secs_f64()
    );
    Ok(())
}

/// Reads until the piece is full or there is no more.
fn fill(from: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < piece.len() {
        match from.read(&mut piece[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Writes runs of pages that are not zero, and returns how many bytes that were.
fn write_data(to: &File, at: u64, piece: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    for (run, _) in runs(piece).filter(|(_, zero)| !zero) {
        to.write_all_at(&piece[run.clone()], at + run.start as u64)?;
        written += run.len() as u64;
    }
    Ok(written)
}

/// Runs of pages that are zero, and of pages that are not.
fn runs(piece: &[u8]) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut pages = piece[at..].chunks(PAGE);
        let first = pages.next()?;
        let (start, zero) = (at, chunk::is_zero(first));
        let more: usize = pages.take_while(|page| chunk::is_zero(page) == zero).map(<[u8]>::len).sum();
        at += first.len() + more;
        Some((start..at, zero))
    })
}

fn disk() -> io::Result<PathBuf> {
    for device in fs::read_dir("/sys/block")? {
        let device = device?;
        let serial = fs::read_to_string(device.path().join("serial")).unwrap_or_default();
        if serial.trim() == SERIAL {
            return Ok(PathBuf::from("/dev").join(device.file_name()));
        }
    }
    Err(io::Error::other("no disk has the serial number `image`"))
}

fn first_number(path: &str) -> io::Result<f64> {
    let text = fs::read_to_string(path)?;
    let word = text.split_whitespace().next().and_then(|word| word.parse().ok());
    word.ok_or_else(|| io::Error::other(format!("{path} has no number")))
}

/// A line of `/proc/meminfo`, in KiB.
fn memory(name: &str) -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
    line.ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {name}")))
}

fn power_off() -> io::Result<()> {
    // SAFETY: a number; all is synced.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    Err(io::Error::last_os_error())
}

/// The last word to the monitor.
fn say(word: u8) -> io::Result<()> {
    // SAFETY: three numbers.
    if unsafe { libc::ioperm(CONTROL_PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the port is ours now, and touches no memory.
    unsafe { asm!("out dx, al", in("dx") CONTROL_PORT, in("al") word, options(nomem, nostack)) };
    Err(io::Error::other("the control port did nothing"))
}
