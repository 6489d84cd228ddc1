//! The manifest: what the snapshot is of, and how its parts lie.
//!
//! In: what the writer was told, or bytes under a correct CRC. Out: the same data, in itself consistent. Holds: writer
//! and reader apply the same [`Manifest::check`], so nothing can be written that could not be read.

use crate::{CHUNK_SIZE, DIGEST, NOTES_MAX, PAGE_SIZE, RAM_RANGES_MAX, RamRange, TEXT_MAX, VCPUS_MAX};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use snapshot_format::GPA_END;
use std::fmt;

/// 16 random bytes that tell one snapshot from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GenerationId(pub [u8; 16]);

impl GenerationId {
    /// A fresh one, from the host's random number generator.
    ///
    /// # Errors
    /// What the host said.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    fn from_hex(text: &str) -> Option<Self> {
        let number = u128::from_str_radix(text, 16).ok()?;
        (text.len() == 32).then(|| Self(number.to_be_bytes()))
    }
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl Serialize for GenerationId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for GenerationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; 16]>::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| D::Error::custom("expected 32 hexadecimal digits"))
    }
}

/// What is known of the kernel in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestKernel {
    /// As `uname -r` has it.
    pub release: Option<String>,
    /// As `uname -v` has it, or the whole banner.
    pub version: Option<String>,
    /// The ELF build id.
    pub build_id: Option<Vec<u8>>,
}

/// Something that a host must have for this machine to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNeed {
    /// Such as `cpu vendor`.
    pub name: String,
    /// Such as `GenuineIntel`.
    pub value: NeedValue,
}

/// The value of a [`HostNeed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NeedValue {
    /// A count, a size, a bit mask.
    Number(u64),
    /// A name.
    Text(String),
}

/// What the machine's owner has to say about the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Of this snapshot.
    pub generation: GenerationId,
    /// Nanoseconds since 1970-01-01 UTC.
    pub created_unix_ns: u64,
    /// Name and version of the program.
    pub writer: String,
    /// Of the guest.
    pub kernel: GuestKernel,
    /// Of the host.
    pub host_needs: Vec<HostNeed>,
    /// Names of the machine's devices.
    pub devices: Vec<String>,
}

/// How RAM is laid out, in the guest and in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamFormat {
    /// Bytes of guest memory: the sum of the ranges.
    pub bytes: u64,
    /// [`PAGE_SIZE`].
    pub page_size: u64,
    /// [`CHUNK_SIZE`].
    pub chunk_size: u64,
    /// [`DIGEST`].
    pub digest: String,
    /// In the order of their addresses.
    pub ranges: Vec<RamRange>,
}

impl RamFormat {
    /// This version's format for these ranges.
    pub(crate) fn of(ranges: &[RamRange]) -> Self {
        let bytes = ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
        let (page_size, chunk_size) = (PAGE_SIZE, CHUNK_SIZE);
        Self { bytes, page_size, chunk_size, digest: DIGEST.to_owned(), ranges: ranges.to_vec() }
    }
}

/// A section's place in the machine state is the sum of the lengths before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionEntry {
    /// Unique.
    pub name: String,
    /// Of the section's encoding.
    pub version: u32,
    /// In bytes.
    pub len: u32,
    /// CRC-32 (IEEE 802.3) of the section's bytes.
    pub crc: u32,
}

/// The manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the machine's owner said.
    pub about: About,
    /// The snapshot that this one is a difference to.
    pub parent: Option<GenerationId>,
    /// The machine's RAM.
    pub ram: RamFormat,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// In the order in which they lie in the machine state.
    pub sections: Vec<SectionEntry>,
}

/// A manifest contradicts itself, or the format's limits.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A number is not one this version knows.
    #[error("{what} is {found}, expected {expected}")]
    Value {
        /// The field.
        what: &'static str,
        /// Its value.
        found: String,
        /// The values allowed.
        expected: String,
    },
    /// A text is empty, too long, or would upset a terminal.
    #[error("{what} {text:?} is not a line of 1 to {TEXT_MAX} bytes without control characters")]
    Text {
        /// The field.
        what: &'static str,
        /// Its first characters.
        text: String,
    },
    /// A RAM range is not made of pages, or leaves the address space.
    #[error("RAM range at GPA {gpa:#x} of {len:#x} bytes: expected whole 4 KiB pages below 2^52")]
    Range {
        /// Its start.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// RAM ranges overlap or are out of order.
    #[error("RAM range at GPA {gpa:#x} starts before the one ahead of it ends, at {end:#x}")]
    Overlap {
        /// Its start.
        gpa: u64,
        /// Where the other ends.
        end: u64,
    },
    /// Two sections have one name.
    #[error("two sections are named {name}")]
    DuplicateSection {
        /// Their name.
        name: String,
    },
}

impl Manifest {
    /// Refuses what no machine could be.
    pub(crate) fn check(&self) -> Result<(), ManifestError> {
        self.ram.check()?;
        check_value("number of vCPUs", self.vcpus, 1..=VCPUS_MAX)?;
        self.about.check()?;
        self.check_sections()
    }

    fn check_sections(&self) -> Result<(), ManifestError> {
        let mut names: Vec<_> = self.sections.iter().map(|entry| entry.name.as_str()).collect();
        names.iter().try_for_each(|name| check_text("section name", name))?;
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ManifestError::DuplicateSection { name: twice[0].to_owned() });
        }
        let bytes = self.sections.iter().map(|entry| u64::from(entry.len)).sum::<u64>();
        check_value("machine state in bytes", bytes, 0..=NOTES_MAX)
    }
}

impl About {
    fn check(&self) -> Result<(), ManifestError> {
        let GuestKernel { release, version, build_id } = &self.kernel;
        check_text("writer", &self.writer)?;
        check_texts("kernel release", release)?;
        check_texts("kernel version", version)?;
        check_texts("device name", &self.devices)?;
        for HostNeed { name, value } in &self.host_needs {
            check_text("host need", name)?;
            if let NeedValue::Text(text) = value {
                check_text("value of a host need", text)?;
            }
        }
        check_value("length of the build id", build_id.as_ref().map_or(1, Vec::len), 1..=64)
    }
}

impl RamFormat {
    fn check(&self) -> Result<(), ManifestError> {
        check_value("page size", self.page_size, PAGE_SIZE..=PAGE_SIZE)?;
        check_value("chunk size", self.chunk_size, CHUNK_SIZE..=CHUNK_SIZE)?;
        check_value("digest", self.digest.as_str(), DIGEST..=DIGEST)?;
        check_value("number of RAM ranges", self.ranges.len(), 1..=RAM_RANGES_MAX)?;
        let mut end = 0;
        for range in &self.ranges {
            end = check_range(range, end)?;
        }
        let sum = self.ranges.iter().map(|range| range.len).sum();
        check_value("RAM in bytes", self.bytes, sum..=sum)
    }
}

/// The end of this range, which has to start at `after` or later.
fn check_range(range: &RamRange, after: u64) -> Result<u64, ManifestError> {
    let RamRange { gpa, len } = *range;
    let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
    let end = gpa.checked_add(len).filter(|end| whole && *end <= GPA_END);
    if gpa < after {
        return Err(ManifestError::Overlap { gpa, end: after });
    }
    end.ok_or(ManifestError::Range { gpa, len })
}

fn check_value<T>(
    what: &'static str,
    found: T,
    allowed: std::ops::RangeInclusive<T>,
) -> Result<(), ManifestError>
where
    T: PartialOrd + fmt::Display,
{
    if allowed.contains(&found) {
        return Ok(());
    }
    let (low, high) = allowed.into_inner();
    let expected = if low == high { low.to_string() } else { format!("{low} to {high}") };
    Err(ManifestError::Value { what, found: found.to_string(), expected })
}

fn check_texts<'a>(
    what: &'static str,
    texts: impl IntoIterator<Item = &'a String>,
) -> Result<(), ManifestError> {
    texts.into_iter().try_for_each(|text| check_text(what, text))
}

/// Texts are shown to people: a control character could rewrite what a terminal shows.
fn check_text(what: &'static str, text: &str) -> Result<(), ManifestError> {
    if (1..=TEXT_MAX).contains(&text.len()) && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ManifestError::Text { what, text: text.chars().take(40).collect() })
}
