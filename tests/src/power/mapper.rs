//! Device mapper's log-writes target (Linux `Documentation/admin-guide/device-mapper/log-writes.rst`).
//!
//! In: two block devices. Out: a third, which is the first, and notes on the second what is written to it and when it is flushed.
//! Holds: when it is dropped the device is gone, and the log has an end.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Bytes of `struct dm_ioctl` (Linux `include/uapi/linux/dm-ioctl.h`), as are the numbers below.
const HEADER: usize = 312;
const NAME_AT: usize = 48;
const DEVICE_AT: usize = 40;
/// `_IOWR(0xfd, command, struct dm_ioctl)`.
const REQUEST: u32 = 0xc138_fd00;
const CREATE: u32 = 3;
const REMOVE: u32 = 4;
/// With no flags it resumes.
const SUSPEND: u32 = 6;
const LOAD: u32 = 9;
const MESSAGE: u32 = 14;

/// The device.
pub struct Logged {
    control: File,
    name: String,
    device: PathBuf,
}

impl Logged {
    /// Makes a device of that name.
    ///
    /// # Errors
    /// The kernel has no such target, or won't.
    pub fn new(name: &str, data: &Path, log: &Path) -> Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/mapper/control");
        let control = control.context("no device mapper")?;
        let mut made = Self { control, name: name.to_owned(), device: PathBuf::new() };
        let answer = made.ask(CREATE, 0, &[]).context("cannot make a mapped device")?;
        made.device = node(&answer);
        made.ask(LOAD, 1, &table(data, log)?).context("no log-writes target")?;
        made.ask(SUSPEND, 0, &[]).context("cannot start the log-writes target")?;
        Ok(made)
    }

    /// Where it is.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Notes a word, which has no spaces.
    ///
    /// # Errors
    /// The kernel won't.
    pub fn mark(&self, word: &str) -> Result<()> {
        let message = [&[0; 8][..], format!("mark {word}\0").as_bytes()].concat();
        self.ask(MESSAGE, 0, &message).with_context(|| format!("cannot mark {word}")).map(drop)
    }

    fn ask(&self, command: u32, targets: u32, data: &[u8]) -> Result<Vec<u8>> {
        let mut buf = vec![0; (HEADER + data.len()).next_multiple_of(8)];
        let len = buf.len() as u32;
        for (at, number) in [(0, 4), (12, len), (16, HEADER as u32), (20, targets)] {
            buf[at..at + 4].copy_from_slice(&u32::to_le_bytes(number));
        }
        buf[NAME_AT..NAME_AT + self.name.len()].copy_from_slice(self.name.as_bytes());
        buf[HEADER..HEADER + data.len()].copy_from_slice(data);
        let request = (REQUEST | command) as libc::Ioctl;
        // SAFETY: the buffer is as long as it says, and outlives the call.
        let done = unsafe { libc::ioctl(self.control.as_raw_fd(), request, buf.as_mut_ptr()) };
        ensure!(done == 0, "command {command}: {}", io::Error::last_os_error());
        Ok(buf)
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        // Its owner sees by the log whether it has an end.
        let _ = self.ask(REMOVE, 0, &[]);
    }
}

/// One `struct dm_target_spec`, and its parameters.
fn table(data: &Path, log: &Path) -> Result<Vec<u8>> {
    let name = data.file_name().and_then(|name| name.to_str()).context("a device's name")?;
    let sectors: u64 = fs::read_to_string(format!("/sys/class/block/{name}/size"))?.trim().parse()?;
    let mut kind = [0; 16];
    kind[..10].copy_from_slice(b"log-writes");
    let parameters = format!("{} {}\0", data.display(), log.display());
    let next = (40 + parameters.len()).next_multiple_of(8) as u32;
    let numbers = [&0u64.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4], &next.to_le_bytes()].concat();
    Ok([&numbers[..], &kind, parameters.as_bytes()].concat())
}

/// A device's number has the minor one in its bits 0 to 7 and 20 to 31.
fn node(answer: &[u8]) -> PathBuf {
    let number = u32::from_le_bytes(answer[DEVICE_AT..DEVICE_AT + 4].try_into().unwrap_or_default());
    PathBuf::from(format!("/dev/dm-{}", number & 0xff | number >> 12 & 0xfff00))
}
