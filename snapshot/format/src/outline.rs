//! The manifest's outline: what of it is needed to check the rest of the file.
//!
//! In: the manifest's bytes, under a correct CRC. Out: parent, RAM ranges, number of vCPUs, and the sections of the machine
//! state. Holds: all of the manifest is walked to its last byte, whatever it says; texts are borrowed.
//!
//! The encoding is postcard: numbers in LEB128, sequences and texts after their length, an option after a byte 0 or 1.

use crate::elf::expect;
use crate::{
    CHUNK_SIZE, DIGEST, Expected, Fault, GPA_END, PAGE_SIZE, Part, RAM_RANGES_MAX, RamRange, VCPUS_MAX, note,
};

const MANIFEST: Part = Part::Named(note::MANIFEST.1);
/// Bytes of a generation id.
const ID_LEN: usize = 16;

/// A section of the machine state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionOutline<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its length in bytes.
    pub len: u32,
    /// CRC-32 of its bytes.
    pub crc: u32,
}

/// The outline.
#[derive(Clone, Copy, Debug)]
pub struct Outline<'a> {
    /// Generation id of the snapshot that this one is a difference to.
    pub parent: Option<[u8; ID_LEN]>,
    /// Number of vCPUs.
    pub vcpus: u32,
    ranges: [RamRange; RAM_RANGES_MAX],
    range_count: usize,
    sections: Cursor<'a>,
    section_count: usize,
}

impl<'a> Outline<'a> {
    /// Walks the manifest.
    ///
    /// # Errors
    /// Bytes that are no manifest, numbers that this version does not know, RAM that no machine has.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor { bytes, at: 0 };
        cursor.skip_about()?;
        let parent = if cursor.option()? { Some(cursor.id()?) } else { None };
        let (ranges, range_count) = cursor.ram()?;
        let vcpus = cursor.number()?;
        expect(MANIFEST, "number of vCPUs", vcpus, Expected::Between(1, VCPUS_MAX.into()))?;
        let section_count = cursor.count()?;
        let sections = cursor;
        (0..section_count).try_for_each(|_| cursor.section().map(drop))?;
        match bytes.len() - cursor.at {
            0 => {}
            left => return Err(Fault::ManifestTooLong { left }),
        }
        Ok(Self { parent, vcpus: vcpus as u32, ranges, range_count, sections, section_count })
    }

    /// The machine's RAM, in the order of guest addresses.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges[..self.range_count]
    }

    /// In the order in which they lie in the machine state.
    pub fn sections(&self) -> impl Iterator<Item = SectionOutline<'a>> {
        let mut cursor = self.sections;
        (0..self.section_count).map_while(move |_| cursor.section().ok())
    }
}

/// A place in the manifest.
#[derive(Clone, Copy, Debug)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn fault(&self) -> Fault {
        Fault::Manifest { offset: self.at }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let taken = self.bytes[self.at..].get(..len).ok_or(self.fault())?;
        self.at += len;
        Ok(taken)
    }

    /// At most 64 bits in 10 bytes.
    fn number(&mut self) -> Result<u64, Fault> {
        let mut value = 0u128;
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u128::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u64::try_from(value).map_err(|_| self.fault());
            }
        }
        Err(self.fault())
    }

    fn number32(&mut self) -> Result<u32, Fault> {
        u32::try_from(self.number()?).map_err(|_| self.fault())
    }

    /// Of elements, each of which takes a byte at least.
    fn count(&mut self) -> Result<usize, Fault> {
        let count = self.number()?;
        usize::try_from(count).ok().filter(|count| *count <= self.bytes.len()).ok_or(self.fault())
    }

    fn option(&mut self) -> Result<bool, Fault> {
        match self.take(1)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.fault()),
        }
    }

    fn id(&mut self) -> Result<[u8; ID_LEN], Fault> {
        let bytes = self.take(ID_LEN)?;
        bytes.try_into().map_err(|_| self.fault())
    }

    fn counted_bytes(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.count()?;
        self.take(len)
    }

    fn text(&mut self) -> Result<&'a str, Fault> {
        core::str::from_utf8(self.counted_bytes()?).map_err(|_| self.fault())
    }

    /// Who, when, what: generation, time, writer, kernel, host needs, devices.
    fn skip_about(&mut self) -> Result<(), Fault> {
        self.id()?;
        self.number()?;
        self.text()?;
        for _ in 0..2 {
            if self.option()? {
                self.text()?;
            }
        }
        if self.option()? {
            self.counted_bytes()?;
        }
        for _ in 0..self.count()? {
            self.skip_need()?;
        }
        for _ in 0..self.count()? {
            self.text()?;
        }
        Ok(())
    }

    fn skip_need(&mut self) -> Result<(), Fault> {
        self.text()?;
        match self.number()? {
            0 => self.number().map(drop),
            1 => self.text().map(drop),
            _ => Err(self.fault()),
        }
    }

    fn ram(&mut self) -> Result<([RamRange; RAM_RANGES_MAX], usize), Fault> {
        let bytes = self.number()?;
        expect(MANIFEST, "page size", self.number()?, Expected::One(PAGE_SIZE))?;
        expect(MANIFEST, "chunk size", self.number()?, Expected::One(CHUNK_SIZE))?;
        if self.text()? != DIGEST {
            return Err(self.fault());
        }
        let count = self.number()?;
        expect(MANIFEST, "number of RAM ranges", count, Expected::Between(1, RAM_RANGES_MAX as u64))?;
        let mut ranges = [RamRange::default(); RAM_RANGES_MAX];
        let (mut end, mut sum) = (0, 0);
        for range in &mut ranges[..count as usize] {
            *range = self.range(end)?;
            (end, sum) = (range.gpa + range.len, sum + range.len);
        }
        expect(MANIFEST, "RAM in bytes", bytes, Expected::One(sum))?;
        Ok((ranges, count as usize))
    }

    /// A range that starts at `after` or later, and does not leave the address space.
    fn range(&mut self, after: u64) -> Result<RamRange, Fault> {
        let (gpa, len) = (self.number()?, self.number()?);
        expect(MANIFEST, "start of a RAM range", gpa, Expected::Pages(after, GPA_END - PAGE_SIZE))?;
        expect(MANIFEST, "length of a RAM range", len, Expected::Pages(PAGE_SIZE, GPA_END - gpa))?;
        Ok(RamRange { gpa, len })
    }

    fn section(&mut self) -> Result<SectionOutline<'a>, Fault> {
        let name = self.text()?;
        let (_version, len, crc) = (self.number32()?, self.number32()?, self.number32()?);
        Ok(SectionOutline { name, len, crc })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn numbers_of_64_bits_and_no_more() {
        let decode = |bytes: &[u8]| Cursor { bytes, at: 0 }.number();
        assert_eq!(decode(&[0x80, 0x01]), Ok(128));
        assert_eq!(decode(&[[0xff; 9].as_slice(), &[1]].concat()), Ok(u64::MAX));
        assert!(decode(&[[0xff; 9].as_slice(), &[2]].concat()).is_err());
        assert!(decode(&[0xff; 11]).is_err() && decode(&[0x80]).is_err() && decode(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_outline_or_a_fault(bytes: Vec<u8>) {
            let _ = Outline::decode(&bytes);
        }
    }
}
