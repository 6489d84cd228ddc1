//! The kernel's clock and its random pool.
//!
//! In: a time, random bytes. Out: nothing. Holds: root is needed for both.
//!
//! Sources: clock_settime(2), random(4), Linux `include/uapi/linux/random.h`.

use crate::message::MAX_SEED;
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// `_IOW('R', 0x03, int[2])`: mixes bytes in and counts them as random.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`: draws a new key for the generator now, not in minutes.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info`, with room for what we take.
#[repr(C)]
struct RandPoolInfo {
    /// In bits.
    entropy_count: i32,
    /// In bytes.
    buf_size: i32,
    buf: [u8; MAX_SEED],
}

/// Sets the wall clock to this time after 1970-01-01 00:00 UTC.
///
/// # Errors
/// What clock_settime(2) says.
pub fn set_clock(since_epoch: Duration) -> io::Result<()> {
    let tv_sec = i64::try_from(since_epoch.as_secs()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let time = Timespec { tv_sec, tv_nsec: since_epoch.subsec_nanos().into() };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Makes the kernel's random numbers depend on these bytes, at most [`MAX_SEED`], at once.
///
/// # Errors
/// There are too many bytes, or what random(4) says.
pub fn reseed(random: &[u8]) -> io::Result<()> {
    let pool = rand_pool_info(random).ok_or(io::ErrorKind::InvalidInput)?;
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the two counts and `buf_size` bytes after them, which is within `buf`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
}

fn rand_pool_info(random: &[u8]) -> Option<RandPoolInfo> {
    let mut buf = [0; MAX_SEED];
    buf.get_mut(..random.len())?.copy_from_slice(random);
    let bytes = random.len() as i32;
    Some(RandPoolInfo { entropy_count: bytes * 8, buf_size: bytes, buf })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_counted_in_bits_and_bytes() {
        let pool = rand_pool_info(&[7; 32]).unwrap();
        assert_eq!((pool.entropy_count, pool.buf_size), (256, 32));
        assert_eq!((pool.buf[31], pool.buf[32]), (7, 0));
        assert!(rand_pool_info(&[0; MAX_SEED + 1]).is_none());
    }

    #[test]
    fn the_counts_come_first_and_the_bytes_follow_at_once() {
        assert_eq!(std::mem::offset_of!(RandPoolInfo, buf), 8);
    }
}
