//! Sections: named, versioned parts of the machine state.
//!
//! In: plain serde data, or a section's bytes. Out: postcard bytes, or the data. Holds: a section decodes to its last
//! byte or not at all.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A part of the machine state to be written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Unique within a snapshot.
    pub name: String,
    /// Of the encoding of this section.
    pub version: u32,
    /// Opaque to this crate.
    pub bytes: Vec<u8>,
}

impl Section {
    /// `value` as a section, in postcard.
    ///
    /// # Errors
    /// [`SectionError::Encode`] for data that postcard cannot express, such as a sequence of unknown length.
    pub fn encode<T: Serialize>(name: &str, version: u32, value: &T) -> Result<Self, SectionError> {
        let encode = |source| SectionError::Encode { name: name.to_owned(), source };
        let bytes = postcard::to_stdvec(value).map_err(encode)?;
        Ok(Self { name: name.to_owned(), version, bytes })
    }

    /// The section as a reader sees it.
    pub fn as_ref(&self) -> SectionRef<'_> {
        SectionRef { name: &self.name, version: self.version, bytes: &self.bytes }
    }
}

/// A part of the machine state of a verified snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionRef<'a> {
    /// Unique within a snapshot.
    pub name: &'a str,
    /// Of the encoding of this section.
    pub version: u32,
    /// Intact, but possibly hostile.
    pub bytes: &'a [u8],
}

impl SectionRef<'_> {
    /// The data that [`Section::encode`] was given.
    ///
    /// # Errors
    /// Another version than `version`, bytes that are not a `T`, bytes left over.
    pub fn decode<T: DeserializeOwned>(&self, version: u32) -> Result<T, SectionError> {
        if self.version != version {
            let name = self.name.to_owned();
            return Err(SectionError::Version { name, found: self.version, expected: version });
        }
        decode(self.name, self.bytes)
    }
}

/// Decodes postcard and refuses trailing bytes.
pub(crate) fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, SectionError> {
    let decode = |source| SectionError::Decode { name: name.to_owned(), source };
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(decode)?;
    if rest.is_empty() {
        return Ok(value);
    }
    Err(SectionError::Trailing { name: name.to_owned(), left: rest.len() })
}

/// A section could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// The data has no postcard form.
    #[error("cannot encode section {name}")]
    Encode {
        /// The section.
        name: String,
        /// What postcard said.
        source: postcard::Error,
    },
    /// The bytes are something else.
    #[error("section {name} does not decode")]
    Decode {
        /// The section.
        name: String,
        /// What postcard said.
        source: postcard::Error,
    },
    /// The section is of another version.
    #[error("section {name} has version {found}, expected {expected}")]
    Version {
        /// The section.
        name: String,
        /// Its version in the file.
        found: u32,
        /// The version that is understood.
        expected: u32,
    },
    /// The data ends before the section does.
    #[error("section {name} has {left} bytes after its end")]
    Trailing {
        /// The section.
        name: String,
        /// How many.
        left: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_to_the_last_byte_or_not_at_all() {
        let mut section = Section::encode("serial", 3, &(7u32, vec![1u8, 2])).unwrap();
        assert_eq!(section.as_ref().decode::<(u32, Vec<u8>)>(3).unwrap(), (7, vec![1, 2]));
        let other = section.as_ref().decode::<(u32, Vec<u8>)>(4);
        assert!(matches!(other, Err(SectionError::Version { found: 3, expected: 4, .. })));
        section.bytes.push(0);
        let longer = section.as_ref().decode::<(u32, Vec<u8>)>(3);
        assert!(matches!(longer, Err(SectionError::Trailing { left: 1, .. })));
        section.bytes.truncate(2);
        let shorter = section.as_ref().decode::<(u32, Vec<u8>)>(3);
        assert!(matches!(shorter, Err(SectionError::Decode { .. })));
    }

    #[test]
    fn a_claimed_length_of_4_gib_allocates_nothing_of_the_kind() {
        let section = Section { name: "x".into(), version: 1, bytes: vec![0xff, 0xff, 0xff, 0xff, 0x0f] };
        assert!(section.as_ref().decode::<Vec<u64>>(1).is_err());
    }
}
