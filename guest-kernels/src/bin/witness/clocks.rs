//! What time it is, by every clock that a guest has, and random bytes: what a restored guest must not have as its twin has.
//!
//! In: nothing. Out: five times a second a line `clocks realtime=NS monotonic=NS rtc=S ptp=NS random=HEX`, for ever; a clock
//! that is not there says `none`. Holds: the times of a line are read one right after the other.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Duration;

const RTC: &str = "/sys/class/rtc/rtc0/since_epoch";
const PTP: &str = "/dev/ptp0";
const PAUSE: Duration = Duration::from_millis(200);

/// Prints lines until something fails, and says what.
pub(crate) fn tell() -> String {
    loop {
        match line() {
            Ok(line) => println!("{line}"),
            Err(error) => return error.to_string(),
        }
        std::thread::sleep(PAUSE);
    }
}

fn line() -> std::io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let rtc = fs::read_to_string(RTC).map_or("none".to_owned(), |text| text.trim().to_owned());
    let ptp = ptp().map_or("none".to_owned(), |time| time.to_string());
    let (realtime, monotonic) = (time(libc::CLOCK_REALTIME)?, time(libc::CLOCK_MONOTONIC)?);
    Ok(format!("clocks realtime={realtime} monotonic={monotonic} rtc={rtc} ptp={ptp} random={random}"))
}

/// Nanoseconds.
fn time(clock: libc::clockid_t) -> std::io::Result<i64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing, and a clock that doesn't exist is an error.
    match unsafe { libc::clock_gettime(clock, &mut now) } {
        0 => Ok(now.tv_sec * 1_000_000_000 + now.tv_nsec),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The host's time by way of PTP_KVM. A descriptor is a clock's number by `FD_TO_CLOCKID` (clock_gettime(2)).
fn ptp() -> Option<i64> {
    let file = File::open(PTP).ok()?;
    time(!file.as_raw_fd() << 3 | 3).ok()
}
