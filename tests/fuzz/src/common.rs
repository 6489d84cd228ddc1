//! What the targets have in common.
//!
//! In: bytes that were snapshots once. Out: the same with CRCs that are right again, so that what is behind them is reached. Holds:
//! nobody asks for more memory than 32 MiB at once.

#![allow(dead_code, unused_imports, unused_macros)]

use snapshot::Manifest;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// More than the notes may be long, several times.
const MOST: usize = 32 << 20;

struct Bounded;

// SAFETY: it is the system's allocator, and says no to what nobody should ask for.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            std::process::abort();
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static BOUNDED: Bounded = Bounded;

/// libFuzzer's own changes; after three of four, `$seal` makes right what has to be.
macro_rules! mutate_and {
    ($seal:path) => {
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
            if seed % 4 != 0 {
                $seal(&mut data[..size]);
            }
            size
        });
    };
}
pub(crate) use mutate_and;

/// A file in memory.
pub fn file_of(bytes: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// Two files: the length of the first is in front.
pub fn split(data: &[u8]) -> (&[u8], &[u8]) {
    let Some((len, rest)) = data.split_first_chunk() else { return (data, &[]) };
    rest.split_at(rest.len().min(u32::from_le_bytes(*len) as usize))
}

/// As [`seal`], of two files.
pub fn seal_both(data: &mut [u8]) {
    let (top, parent) = split_mut(data);
    seal(top);
    seal(parent);
}

fn split_mut(data: &mut [u8]) -> (&mut [u8], &mut [u8]) {
    if data.len() < 4 {
        return (data, &mut []);
    }
    let (len, rest) = data.split_first_chunk_mut().unwrap();
    let at = rest.len().min(u32::from_le_bytes(*len) as usize);
    rest.split_at_mut(at)
}

/// Where the descriptors of the notes are.
#[derive(Default)]
struct Found {
    debugger: Vec<Range<usize>>,
    /// Header, manifest, state, table, seal.
    own: [Option<Range<usize>>; 5],
}

/// Makes the CRCs right as far as the file still has the shape of one.
pub fn seal(file: &mut [u8]) {
    let Some(found) = notes(file) else { return };
    let [Some(header), Some(manifest), Some(state), Some(table), seal] = found.own else { return };
    if header.len() != snapshot::HEADER_LEN {
        return;
    }
    seal_sections(file, &manifest, &state);
    if let Some(crc) = seal.filter(|range| range.len() >= 4).map(|range| range.start..range.end - 4) {
        let sum = crc32fast::hash(&file[crc.clone()]);
        file[crc.end..crc.end + 4].copy_from_slice(&sum.to_le_bytes());
    }
    let debugger: Vec<u8> = found.debugger.iter().flat_map(|range| file[range.clone()].to_vec()).collect();
    let parts = [debugger, file[manifest].to_vec(), file[table].to_vec()];
    let header = &mut file[header];
    for (part, frame) in parts.iter().zip(header[12..36].chunks_exact_mut(8)) {
        frame[..4].copy_from_slice(&(part.len() as u32).to_le_bytes());
        frame[4..].copy_from_slice(&crc32fast::hash(part).to_le_bytes());
    }
    header[36..40].copy_from_slice(&(state.len() as u32).to_le_bytes());
    let crc = crc32fast::hash(&header[..40]);
    header[40..44].copy_from_slice(&crc.to_le_bytes());
}

/// The manifest has a CRC of each section; as long as it stays as long as it is.
fn seal_sections(file: &mut [u8], manifest: &Range<usize>, state: &Range<usize>) {
    let Ok(mut decoded) = postcard::from_bytes::<Manifest>(&file[manifest.clone()]) else { return };
    let mut at = state.start;
    for entry in &mut decoded.sections {
        let end = at + entry.len as usize;
        if end > state.end {
            return;
        }
        entry.crc = crc32fast::hash(&file[at..end]);
        at = end;
    }
    let encoded = postcard::to_stdvec(&decoded).unwrap_or_default();
    if encoded.len() == manifest.len() {
        file[manifest.clone()].copy_from_slice(&encoded);
    }
}

fn number(file: &[u8], at: usize, len: usize) -> Option<usize> {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(file.get(at..at.checked_add(len)?)?);
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

fn notes(file: &[u8]) -> Option<Found> {
    let (mut at, len) = (number(file, 64 + 8, 8)?, number(file, 64 + 32, 8)?);
    let end = at.checked_add(len)?.min(file.len());
    let mut found = Found::default();
    while at < end && end - at >= 12 {
        let [name, desc] = [number(file, at, 4)?, number(file, at + 4, 4)?];
        let kind = number(file, at + 8, 4)?;
        let owner = file.get(at + 12..(at + 12).checked_add(name)?)?;
        let start = at + 12 + name.next_multiple_of(4);
        let range = start..start.checked_add(desc)?;
        file.get(range.clone())?;
        match (owner, kind) {
            (b"CORE\0" | b"VMCOREINFO\0", _) => found.debugger.push(range),
            (b"VMMSNAP\0", 0x534e_4150..=0x534e_4154) => found.own[kind - 0x534e_4150] = Some(range),
            _ => {}
        }
        at = start + desc.next_multiple_of(4);
    }
    Some(found)
}
