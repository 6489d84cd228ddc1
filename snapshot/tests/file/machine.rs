//! A small machine to write: two RAM ranges, two vCPUs, three sections.

use snapshot::{
    About, CHUNK_SIZE, ChunkContent, Contents, GenerationId, GuestKernel, HostNeed, NeedValue, RamRange,
    RamSource, Registers, SealKey, Section, Snapshot, Summary, UnverifiedSnapshot, VerifyError, WriteError,
};
use std::{collections::BTreeMap, io, path::Path};

/// Of no round length, so that the note has padding.
pub(crate) const VMCOREINFO: &[u8] = b"OSRELEASE=6.1.0-41-cloud-amd64\nPAGESIZE=4096\nKERNELOFFSET=b000000\n";

/// RAM of which only some pages are there; the others are zero.
pub(crate) struct SparseRam {
    pub(crate) ranges: Vec<RamRange>,
    pub(crate) pages: BTreeMap<u64, [u8; 4096]>,
    /// Reading at this address fails.
    pub(crate) broken_at: Option<u64>,
}

impl SparseRam {
    /// Bytes at `gpa`.
    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for (at, page) in self.pages.range(gpa..gpa + len as u64) {
            let start = (at - gpa) as usize;
            out[start..start + 4096].copy_from_slice(page);
        }
        out
    }
}

impl RamSource for SparseRam {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn read_chunk(&self, gpa: u64, buf: &mut [u8]) -> io::Result<ChunkContent> {
        if self.broken_at == Some(gpa) {
            return Err(io::Error::other("the RAM is broken"));
        }
        if self.pages.range(gpa..gpa + buf.len() as u64).next().is_none() {
            buf.fill(0x5a);
            return Ok(ChunkContent::Zero);
        }
        buf.copy_from_slice(&self.bytes(gpa, buf.len()));
        Ok(ChunkContent::Data)
    }
}

pub(crate) struct Machine {
    pub(crate) about: About,
    pub(crate) vcpus: Vec<Registers>,
    pub(crate) vmcoreinfo: Option<&'static [u8]>,
    pub(crate) sections: Vec<Section>,
    pub(crate) ram: SparseRam,
}

impl Machine {
    /// 2 MiB and 12 KiB of RAM from 0, 8 KiB from 4 GiB; pages of data at both ends and in the middle.
    pub(crate) fn small() -> Self {
        let ranges = [(0, 2 * CHUNK_SIZE + 0x3000), (1 << 32, 0x2000)];
        Self::with_ram(&ranges, &[0, 0x7000, 0x8000, 2 * CHUNK_SIZE + 0x2000, (1 << 32) + 0x1000])
    }

    /// RAM of a few pages, so that every byte of the file can be tried.
    pub(crate) fn tiny() -> Self {
        Self::with_ram(&[(0, 0x3000), (1 << 32, 0x1000)], &[0x1000, 1 << 32])
    }

    pub(crate) fn with_ram(ranges: &[(u64, u64)], pages: &[u64]) -> Self {
        let ranges = ranges.iter().map(|(gpa, len)| RamRange { gpa: *gpa, len: *len }).collect();
        let pages = pages.iter().map(|gpa| (*gpa, [(gpa >> 12) as u8 | 0x80; 4096])).collect();
        let ram = SparseRam { ranges, pages, broken_at: None };
        let vcpus = (1..=2).map(|n| Registers { rip: 0x1000 * n, rax: 0xabc0 + n, ..Registers::default() });
        Self {
            about: about(),
            vcpus: vcpus.collect(),
            vmcoreinfo: Some(VMCOREINFO),
            sections: sections(),
            ram,
        }
    }

    pub(crate) fn write(&self, path: &Path) -> Result<Summary, WriteError> {
        self.write_with(path, None, &mut |_, _| ())
    }

    pub(crate) fn write_telling(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Summary, WriteError> {
        self.write_with(path, None, progress)
    }

    pub(crate) fn write_sealed(&self, path: &Path, key: Option<&SealKey>) -> Result<Summary, WriteError> {
        self.write_with(path, key, &mut |_, _| ())
    }

    fn write_with(
        &self,
        path: &Path,
        key: Option<&SealKey>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Summary, WriteError> {
        let Self { about, vcpus, vmcoreinfo, sections, ram } = self;
        let contents =
            Contents { about: about.clone(), vcpus, vmcoreinfo: *vmcoreinfo, sections, ram, delta: None };
        snapshot::write_sealed(path, &contents, key, progress)
    }

    /// The file's bytes.
    pub(crate) fn file(&self) -> Vec<u8> {
        self.bytes(None)
    }

    /// Those of one that is written with a key.
    pub(crate) fn sealed_file(&self, key: &SealKey) -> Vec<u8> {
        self.bytes(Some(key))
    }

    fn bytes(&self, key: Option<&SealKey>) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.snap");
        self.write_sealed(&path, key).unwrap();
        std::fs::read(path).unwrap()
    }
}

fn about() -> About {
    About {
        generation: GenerationId([7; 16]),
        created_unix_ns: 1_700_000_000_000_000_000,
        writer: "test 0.1".to_owned(),
        kernel: GuestKernel {
            release: Some("6.1.0-41-cloud-amd64".to_owned()),
            version: None,
            build_id: Some(vec![1, 2, 3, 4, 5, 6, 7, 8]),
        },
        host_needs: vec![
            HostNeed { name: "cpu vendor".to_owned(), value: NeedValue::Text("AuthenticAMD".to_owned()) },
            HostNeed { name: "xsave size".to_owned(), value: NeedValue::Number(2696) },
        ],
        devices: vec!["serial".to_owned(), "i8042".to_owned()],
    }
}

fn sections() -> Vec<Section> {
    vec![
        Section::encode("serial", 1, &(0x3f8u16, vec![1u8, 2, 3])).unwrap(),
        Section::encode("nothing", 1, &()).unwrap(),
        Section::encode("vcpu 0", 4, &[0x1234_5678u64; 9]).unwrap(),
    ]
}

/// The same of a file that may be a difference to another.
pub(crate) fn verify_link(bytes: &[u8]) -> Result<Snapshot, VerifyError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    UnverifiedSnapshot::open(file.path()).unwrap().verify_link()
}

/// Opens and verifies a file with these bytes.
pub(crate) fn verify(bytes: &[u8]) -> Result<Snapshot, VerifyError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    UnverifiedSnapshot::open(file.path()).unwrap().verify()
}

/// An error and its causes, as `main` prints them.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// RAM as the snapshot has it.
pub(crate) fn restored(snapshot: &Snapshot) -> Vec<(u64, Vec<u8>)> {
    use std::os::unix::fs::FileExt;
    let read = |mapped: &snapshot::MappedRange| {
        let mut bytes = vec![0; mapped.range.len as usize];
        snapshot.file().read_exact_at(&mut bytes, mapped.offset).unwrap();
        (mapped.range.gpa, bytes)
    };
    snapshot.ram().iter().map(read).collect()
}

/// RAM as the machine has it.
pub(crate) fn original(machine: &Machine) -> Vec<(u64, Vec<u8>)> {
    let ram = &machine.ram;
    ram.ranges.iter().map(|range| (range.gpa, ram.bytes(range.gpa, range.len as usize))).collect()
}
