//! What a user asks for, checked.
//!
//! In: text from the command line. Out: a [`Shape`], which a machine of this host can have. Holds: what is refused is
//! refused here, before anything is opened or allocated, in one line.

use crate::kernel::KernelIdentity;
use crate::layout::{PAGE_SIZE, VCPUS};
use rustix::system::sysinfo;
use serde::{Deserialize, Serialize};

/// What a machine is made of. It is fixed for the machine's life, and part of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// What its owner calls it.
    pub name: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// What is known of the kernel that was booted.
    pub kernel: KernelIdentity,
}

impl Shape {
    /// Whether the kernel said that it is Linux.
    pub fn is_linux(&self) -> bool {
        self.kernel.version.is_some()
    }
}

/// The least RAM that boot structures and a kernel can be placed in.
pub const MEMORY_MIN: u64 = 2 << 20;

/// A value on the command line that can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a size.
    #[error("`{0}` is no memory size: expected a number with K, M, G or T, for example 512M or 2G")]
    NotASize(String),
    /// Not a multiple of the page size, or next to nothing.
    #[error("memory of {0} bytes: expected at least 2M, and a multiple of 4K")]
    BadSize(u64),
    /// More than the host has and would lend.
    #[error("memory of {asked} MiB: this host has {host} MiB of RAM and swap, and does not overcommit")]
    MoreThanHost {
        /// MiB asked for.
        asked: u64,
        /// MiB there are.
        host: u64,
    },
    /// Not a name that can be shown.
    #[error("the machine's name: expected 1 to 64 printable characters")]
    BadName,
    /// Not a number of vCPUs that a machine can have.
    #[error("`{text}` vCPUs: expected a number from {} to {}", VCPUS.start(), VCPUS.end())]
    BadVcpus {
        /// What was given.
        text: String,
    },
}

/// Reads a size such as `512M`; a bare number is MiB, as in other monitors.
///
/// # Errors
/// Text that is no size, or a size that no machine can have.
pub fn parse_memory(text: &str) -> Result<u64, ConfigError> {
    let bytes = parse_size(text)?;
    if bytes < MEMORY_MIN || bytes % PAGE_SIZE != 0 { Err(ConfigError::BadSize(bytes)) } else { Ok(bytes) }
}

/// Reads how much memory a guest is to give up; any size that is one.
///
/// # Errors
/// Text that is no size.
pub fn parse_balloon(text: &str) -> Result<u64, ConfigError> {
    parse_size(text)
}

fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let not_a_size = || ConfigError::NotASize(text.to_owned());
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "K" | "k" | "KiB" => 10,
        "" | "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return Err(not_a_size()),
    };
    let number: u64 = digits.parse().map_err(|_| not_a_size())?;
    number.checked_mul(1 << shift).ok_or_else(not_a_size)
}

/// Reads a number of vCPUs.
///
/// # Errors
/// Text that is no number, or one out of range.
pub fn parse_vcpus(text: &str) -> Result<u32, ConfigError> {
    let count = text.parse().ok().filter(|count| VCPUS.contains(count));
    count.ok_or_else(|| ConfigError::BadVcpus { text: text.to_owned() })
}

/// Reads a name: a line of up to 64 printable characters, since it is shown in tables.
///
/// # Errors
/// Text that is none.
pub fn parse_name(text: &str) -> Result<String, ConfigError> {
    if text.is_empty() || text.chars().count() > 64 || text.chars().any(char::is_control) {
        return Err(ConfigError::BadName);
    }
    Ok(text.to_owned())
}

/// Holds the size against what the host has. A host that is told to overcommit without limit
/// (`vm.overcommit_memory=1`) is taken at its word.
///
/// # Errors
/// More than its RAM and swap.
pub fn check_host_memory(bytes: u64) -> Result<(), ConfigError> {
    let host = sysinfo();
    let pages = |count| u64::from(host.mem_unit).saturating_mul(count);
    let fits = fits(bytes, pages(host.totalram).saturating_add(pages(host.totalswap)));
    let overcommits = || {
        let told = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
        told.is_ok_and(|told| told.trim() == "1")
    };
    fits.or_else(|error| if overcommits() { Ok(()) } else { Err(error) })
}

fn fits(bytes: u64, host: u64) -> Result<(), ConfigError> {
    let (asked, host) = (bytes >> 20, host >> 20);
    if asked > host { Err(ConfigError::MoreThanHost { asked, host }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_memory("256M"), Ok(256 << 20));
        assert_eq!(parse_memory("256"), Ok(256 << 20));
        assert_eq!(parse_memory("2G"), Ok(2 << 30));
        assert_eq!(parse_memory("4096K"), Ok(4 << 20));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "lots", "-1G", "1.5G", "2GG", "0x10M", "99999999999T", "1 G"] {
            assert!(matches!(parse_memory(text), Err(ConfigError::NotASize(_))), "{text}");
        }
        for text in ["0", "1M", "2049K"] {
            assert!(matches!(parse_memory(text), Err(ConfigError::BadSize(_))), "{text}");
        }
    }

    #[test]
    fn vcpus_are_from_1_to_16() {
        assert_eq!(parse_vcpus("16"), Ok(16));
        for text in ["0", "17", "500", "-1", "two", ""] {
            assert!(parse_vcpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        assert_eq!(fits(2 << 30, 2 << 30), Ok(()));
        assert_eq!(fits(3 << 30, 2 << 30), Err(ConfigError::MoreThanHost { asked: 3072, host: 2048 }));
    }
}
