//! Which kernel a snapshot is of, and whether it is the expected one.
//!
//! In: a snapshot, what the user expects. Out: release and build id, or a refusal that names both sides. Holds: what was read from
//! the kernel's file at boot comes first; a bzImage hides its build id, so then it is the running kernel's own word, VMCOREINFO.

use crate::vmcoreinfo::value;
use snapshot::Snapshot;
use std::fmt;

/// Fewest digits by which a build id may be named.
const DIGITS_MIN: usize = 8;
/// Most bytes of a build id, as in the manifest.
const BUILD_ID_MAX: usize = 64;

/// A kernel in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelId {
    /// As `uname -r` has it.
    pub release: Option<String>,
    /// The ELF build id.
    pub build_id: Option<Vec<u8>>,
}

impl KernelId {
    /// The kernel of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Self {
        let kernel = &snapshot.manifest().about.kernel;
        let word = || build_id(snapshot.vmcoreinfo()?, kernel.release.as_deref()?);
        let build_id = kernel.build_id.clone().or_else(word);
        Self { release: kernel.release.clone(), build_id }
    }

    /// Whether this is what somebody calls by a release, by its first parts (`6.12`), or by a build id or its first digits.
    pub fn is(&self, expected: &str) -> bool {
        let release = self.release.as_deref().and_then(|release| release.strip_prefix(expected));
        let cut_in_a_number = |rest: &str| {
            rest.starts_with(|c: char| c.is_ascii_digit()) && expected.ends_with(|c: char| c.is_ascii_digit())
        };
        let named = expected.len() >= DIGITS_MIN
            && self.build_id.as_deref().is_some_and(|id| hex(id).starts_with(&expected.to_ascii_lowercase()));
        release.is_some_and(|rest| !cut_in_a_number(rest)) || named
    }
}

impl fmt::Display for KernelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.release.as_deref().unwrap_or("unknown"))?;
        match &self.build_id {
            Some(id) => write!(f, " (build id {})", hex(id)),
            None => f.write_str(" (build id unknown)"),
        }
    }
}

/// Reads what a user expects: a release or a build id.
///
/// # Errors
/// Text that is neither.
pub fn parse(text: &str) -> Result<String, String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || ".+-_~".contains(c);
    if !text.is_empty() && text.len() <= snapshot::TEXT_MAX && text.chars().all(is_part) {
        return Ok(text.to_owned());
    }
    Err("expected a release as of `uname -r`, its first parts, or a build id".to_owned())
}

/// What the user expects, for a message.
pub fn describe(expected: &str) -> String {
    let digits = expected.len() >= DIGITS_MIN && expected.chars().all(|c| c.is_ascii_hexdigit());
    format!("{} {expected}", if digits { "build id" } else { "release" })
}

/// The build id in the VMCOREINFO of a kernel of this release.
fn build_id(vmcoreinfo: &[u8], release: &str) -> Option<Vec<u8>> {
    if value(vmcoreinfo, "OSRELEASE")? == release { unhex(value(vmcoreinfo, "BUILD-ID")?) } else { None }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    if digits.is_empty() || !digits.len().is_multiple_of(2) || pairs.len() > BUILD_ID_MAX {
        return None;
    }
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// A build id in hexadecimal, as `file` and `/sys/kernel/notes` readers show it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> KernelId {
        let (release, build_id) = ("6.12.107+deb13-cloud-amd64", vec![0xe1, 0xb6, 0xc8, 0x1f, 0x7a]);
        KernelId { release: Some(release.to_owned()), build_id: Some(build_id) }
    }

    #[test]
    fn a_kernel_is_known_by_its_release_or_its_build_id() {
        for name in ["6.12", "6.12.107", "6.12.107+deb13-cloud-amd64", "e1b6c81f7a", "E1B6C81F"] {
            assert!(kernel().is(name), "{name}");
        }
        for name in ["6.1", "6.12.1", "6.12.10", "7.2", "6.12.107+deb13-cloud-amd64x", "e1b6c8", "e1b6c81f7b"]
        {
            assert!(!kernel().is(name), "{name}");
        }
        assert!(!KernelId::default().is("6.12"));
    }

    #[test]
    fn a_refusal_names_both() {
        assert_eq!(kernel().to_string(), "6.12.107+deb13-cloud-amd64 (build id e1b6c81f7a)");
        assert_eq!(describe("0123456789abcdef"), "build id 0123456789abcdef");
        assert_eq!(describe("6.12"), "release 6.12");
        assert!(parse("6.1 or so").is_err() && parse("").is_err() && parse("6.1~rc1").is_ok());
    }

    #[test]
    fn vmcoreinfo_has_the_build_id() {
        let id = |text: &str| build_id(text.as_bytes(), "6.1.0");
        assert_eq!(id("OSRELEASE=6.1.0\nBUILD-ID=00ff10\nPAGESIZE=4096\n"), Some(vec![0, 0xff, 0x10]));
        for bad in [
            "OSRELEASE=6.1.1\nBUILD-ID=00ff10\n",
            "OSRELEASE=6.1.0\n",
            "OSRELEASE=6.1.0\nBUILD-ID=0x1\n",
            "OSRELEASE=6.1.0\nBUILD-ID=\n",
            "BUILD-ID=00\n",
        ] {
            assert_eq!(id(bad), None, "{bad}");
        }
    }
}
