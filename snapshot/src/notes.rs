//! The notes of a file to be written.
//!
//! In: [`Contents`]. Out: how long the notes will be, and their bytes once the digests of RAM are known. Holds: the length follows from what is
//! known before RAM is read.

use crate::manifest::RamFormat;
use crate::prstatus::PRSTATUS_LEN;
use crate::{Contents, Delta, Manifest, NOTES_MAX, Section, SectionEntry, WriteError, chunk};
use snapshot_format::header::{FixedHeader, Frame, HEADER_LEN};
use snapshot_format::note;

/// The notes, except for the chunk table, of which the length is known.
pub(crate) struct Notes {
    prstatus: Vec<[u8; PRSTATUS_LEN]>,
    vmcoreinfo: Option<Vec<u8>>,
    manifest: Vec<u8>,
    state: Vec<u8>,
    pub(crate) chunks: u64,
}

impl Notes {
    /// Those of a file with so many chunks of RAM. Refuses a manifest that no reader would take, and notes that are too long.
    pub(crate) fn new(contents: &Contents, chunks: u64) -> Result<Self, WriteError> {
        let delta = contents.delta.map(Delta::encode).transpose()?;
        let sections: Vec<_> = contents.sections.iter().chain(&delta).collect();
        let state_len = sections.iter().map(|section| section.bytes.len() as u64).sum();
        check_len(state_len)?;
        let manifest = manifest(contents, &sections);
        manifest.check()?;
        let state = sections.iter().flat_map(|section| section.bytes.iter().copied()).collect();
        let notes = Self {
            prstatus: contents.vcpus.iter().zip(0..).map(|(vcpu, index)| vcpu.prstatus(index)).collect(),
            vmcoreinfo: contents.vmcoreinfo.map(<[u8]>::to_vec),
            manifest: Section::encode("manifest", crate::FORMAT_VERSION, &manifest)?.bytes,
            state,
            chunks,
        };
        check_len(notes.len())?;
        Ok(notes)
    }

    /// Bytes of all notes.
    pub(crate) fn len(&self) -> u64 {
        let prstatus = note::note_len(note::CORE, PRSTATUS_LEN as u64) * self.prstatus.len() as u64;
        let vmcoreinfo =
            self.vmcoreinfo.as_ref().map_or(0, |desc| note::note_len(note::VMCOREINFO, desc.len() as u64));
        let lens = [HEADER_LEN as u64, self.manifest.len() as u64, self.state.len() as u64];
        let own = lens.into_iter().chain([self.chunks * chunk::DIGEST_LEN]);
        prstatus + vmcoreinfo + own.map(|len| note::note_len(note::VMMSNAP, len)).sum::<u64>()
    }

    /// Their bytes, with the digests of all chunks.
    pub(crate) fn encode(&self, digests: &[u64]) -> Vec<u8> {
        let table = chunk::encode_table(digests);
        let header = FixedHeader {
            debugger: Frame::of(self.prstatus.iter().map(|desc| &desc[..]).chain(self.vmcoreinfo.as_deref())),
            manifest: Frame::of([&self.manifest[..]]),
            table: Frame::of([&table[..]]),
            state_len: self.state.len() as u32,
        };
        let mut out = Vec::new();
        self.prstatus.iter().for_each(|desc| note::push(&mut out, note::CORE, note::NT_PRSTATUS, desc));
        if let Some(desc) = &self.vmcoreinfo {
            note::push(&mut out, note::VMCOREINFO, note::NT_VMCOREINFO, desc);
        }
        let own = [&header.encode()[..], &self.manifest, &self.state, &table];
        for ((kind, _), desc) in [note::HEADER, note::MANIFEST, note::STATE, note::TABLE].iter().zip(own) {
            note::push(&mut out, note::VMMSNAP, *kind, desc);
        }
        out
    }
}

/// Refuses notes of so many bytes if there is no room for them.
pub(crate) fn check_len(len: u64) -> Result<(), WriteError> {
    if len < NOTES_MAX { Ok(()) } else { Err(WriteError::NotesTooLong { len }) }
}

/// The manifest of these contents, not checked yet.
fn manifest(contents: &Contents, sections: &[&Section]) -> Manifest {
    let entry = |section: &&Section| SectionEntry {
        name: section.name.clone(),
        version: section.version,
        len: section.bytes.len() as u32,
        crc: crc32fast::hash(&section.bytes),
    };
    Manifest {
        about: contents.about.clone(),
        parent: contents.delta.map(|delta| delta.parent.generation),
        ram: RamFormat::of(contents.ram.ranges()),
        vcpus: u32::try_from(contents.vcpus.len()).unwrap_or(u32::MAX),
        sections: sections.iter().map(entry).collect(),
    }
}
