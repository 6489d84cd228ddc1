//! A second writer of the format, which writes whatever it is told, with CRCs that are right.
//!
//! In: parts of a snapshot. Out: bytes. Holds: it shares no code with the crate, so it also says what the format is.

use snapshot::{Manifest, RamRange};

/// Parts of a file.
#[derive(Clone)]
pub(crate) struct Forge {
    /// For the program headers.
    pub(crate) loads: Vec<RamRange>,
    /// Bytes of packed pages, instead of these.
    pub(crate) packed: Option<u64>,
    pub(crate) prstatus: Vec<Vec<u8>>,
    pub(crate) vmcoreinfo: Option<&'static [u8]>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) state: Vec<u8>,
    pub(crate) table: Vec<u8>,
    /// Magic, version, and four times length (and CRC) can be spoilt before the header gets its CRC.
    pub(crate) spoil_header: fn(&mut [u8]),
    /// Notes that follow the snapshot's own.
    pub(crate) more_notes: Vec<u8>,
}

impl Forge {
    /// A snapshot of zeroes, of which `manifest` is true.
    pub(crate) fn new(manifest: &Manifest) -> Self {
        let loads = manifest.ram.ranges.clone();
        let state_len = manifest.sections.iter().map(|entry| entry.len as usize).sum();
        Self {
            prstatus: vec![vec![0; 336]; manifest.vcpus as usize],
            vmcoreinfo: None,
            manifest: postcard::to_stdvec(manifest).unwrap(),
            state: vec![0; state_len],
            table: table(&loads),
            loads,
            packed: None,
            spoil_header: |_| (),
            more_notes: Vec::new(),
        }
    }

    /// The same with so many bytes of changed pages, all zero.
    pub(crate) fn packed(manifest: &Manifest, len: u64) -> Self {
        let all = [RamRange { gpa: 0, len }];
        Self { loads: Vec::new(), packed: Some(len), table: table(&all), ..Self::new(manifest) }
    }

    /// All of the file but its RAM.
    pub(crate) fn head(&self) -> Vec<u8> {
        let notes = self.notes();
        let headers = 1 + self.loads.len() + usize::from(self.packed.is_some());
        let start = 64 + 56 * headers;
        let mut offset = (start + notes.len() + 12).next_multiple_of(4096);
        let mut out = elf_header(headers);
        out.extend(program_header(4, 0, [start as u64, 0, 0, notes.len() as u64, notes.len() as u64, 4]));
        for RamRange { gpa, len } in &self.loads {
            out.extend(program_header(1, 7, [offset as u64, *gpa, *gpa, *len, *len, 0]));
            offset = offset.wrapping_add(*len as usize);
        }
        if let Some(len) = self.packed {
            out.extend(program_header(0x6053_4e41, 4, [offset as u64, 0, 0, len, 0, 0]));
        }
        out.extend(notes);
        out.resize((out.len() + 12).next_multiple_of(4096), 0);
        out
    }

    /// The file; its RAM is zero.
    pub(crate) fn file(&self) -> Vec<u8> {
        let mut out = self.head();
        let ram = self.loads.iter().map(|range| range.len).chain(self.packed).sum::<u64>();
        out.resize(out.len() + ram as usize, 0);
        out
    }

    fn notes(&self) -> Vec<u8> {
        let mut out: Vec<u8> = self.prstatus.iter().flat_map(|desc| note(b"CORE\0", 1, desc)).collect();
        out.extend(self.vmcoreinfo.iter().flat_map(|desc| note(b"VMCOREINFO\0", 0, desc)));
        out.extend(note(b"VMMSNAP\0", 0x534e_4150, &self.header()));
        out.extend(note(b"VMMSNAP\0", 0x534e_4151, &self.manifest));
        out.extend(note(b"VMMSNAP\0", 0x534e_4152, &self.state));
        out.extend(note(b"VMMSNAP\0", 0x534e_4153, &self.table));
        out.extend(&self.more_notes);
        out
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"\x89VMSNAP\n\x01\0\0\0".to_vec();
        let for_debuggers = [&self.prstatus.concat(), self.vmcoreinfo.unwrap_or_default()].concat();
        for part in [&for_debuggers, &self.manifest, &self.table] {
            out.extend((part.len() as u32).to_le_bytes());
            out.extend(crc32fast::hash(part).to_le_bytes());
        }
        out.extend((self.state.len() as u32).to_le_bytes());
        (self.spoil_header)(&mut out);
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }
}

/// The digests of zeroes; ranges too long for a test have none.
fn table(ranges: &[RamRange]) -> Vec<u8> {
    let mut out = Vec::new();
    for range in ranges.iter().filter(|range| range.len < 1 << 30) {
        for start in (0..range.len).step_by(1 << 20) {
            let zeroes = vec![0; (range.len - start).min(1 << 20) as usize];
            out.extend(xxhash_rust::xxh3::xxh3_64(&zeroes).to_le_bytes());
        }
    }
    out
}

/// One note.
pub(crate) fn note(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = [owner.len() as u32, desc.len() as u32, kind].map(u32::to_le_bytes).concat();
    for part in [owner, desc] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// An ELF header of a core for x86-64.
pub(crate) fn elf_header(phnum: usize) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    out.extend([0u64, 64, 0].map(u64::to_le_bytes).concat());
    out.extend([0, 0, 64, 56, phnum as u16, 0, 0, 0].map(u16::to_le_bytes).concat());
    out
}

/// A program header: offset, vaddr, paddr, filesz, memsz, align.
pub(crate) fn program_header(kind: u32, flags: u32, numbers: [u64; 6]) -> Vec<u8> {
    let mut out = [kind, flags].map(u32::to_le_bytes).concat();
    out.extend(numbers.map(u64::to_le_bytes).concat());
    out
}
