//! `vmm-image poweroff|return|stub`: what an image kernel's init does for `vmm suspend-with --write-to`.
//!
//! In: `/proc/vmcore`, which is the machine that sleeps, and the disk with the serial number `image`, which is new and reads as zeroes.
//! Out: the one copied to the other and synced, what that cost in one line, and the machine given up. Holds: whatever fails is told in one
//! line with `FAIL`, and the machine that sleeps goes on.

use std::arch::asm;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

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
        _ => {
            eprintln!("usage: vmm-image poweroff|return|stub");
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
    let mut from = File::open("/proc/vmcore")?;
    let to = OpenOptions::new().write(true).open(disk()?)?;
    let begun = Instant::now();
    let (mut at, mut written) = (0, 0);
    let mut piece = vec![0; PIECE];
    loop {
        let len = fill(&mut from, &mut piece)?;
        if len == 0 {
            break;
        }
        written += write_data(&to, at, &piece[..len])?;
        at += len as u64;
    }
    to.sync_all()?;
    let took = begun.elapsed().as_millis();
    let [total, free] = ["MemTotal:", "MemAvailable:"].map(memory);
    println!(
        "image: {} MiB of {} MiB written in {took} ms; this kernel has {} MiB, uses {} MiB, and was up after {booted} s",
        written >> 20,
        at >> 20,
        total? >> 10,
        (memory("MemTotal:")? - free?) >> 10,
    );
    Ok(())
}

/// Reads until the piece is full or there is no more.
fn fill(from: &mut File, piece: &mut [u8]) -> io::Result<usize> {
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
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut written = 0;
    let mut start = 0;
    let pages: Vec<_> = piece.chunks(PAGE).collect();
    for run in pages.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let len: usize = run.iter().map(|page| page.len()).sum();
        if !is_zero(run[0]) {
            to.write_all_at(&piece[start..start + len], at + start as u64)?;
            written += len as u64;
        }
        start += len;
    }
    Ok(written)
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
