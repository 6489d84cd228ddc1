//! RAM from a chain of snapshots: what changed lies over what it changed.
//!
//! In: RAM that is mapped from the first of a chain, and pieces of the files after it. Out: RAM as the last has it. Holds: a process
//! has only so many mappings, so the pieces beyond [`MAPPED_MAX`], the smallest, are read into memory of its own instead.

use super::{GuestRam, RamError};
use crate::layout::PAGE_SIZE;
use crate::lost_ram;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Most pieces that are mapped. Each parts one mapping in two at worst; Linux gives a process 65530.
pub const MAPPED_MAX: usize = 16 << 10;
/// Most bytes that are read at a time.
const COPIED: u64 = 1 << 20;
/// Bytes between two pieces that are read along with them: one more read costs more.
const GAP: u64 = 64 << 10;

/// A part of RAM that lies in another file than the first.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The file.
    pub file: &'a Arc<File>,
    /// What it is called.
    pub path: &'a Path,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Bytes, whole pages.
    pub len: u64,
    /// Where in the file it begins.
    pub offset: u64,
}

/// One that is mapped.
#[derive(Debug)]
pub(super) struct Mapped {
    /// Guest physical addresses.
    pub(super) gpas: Range<u64>,
    pub(super) file: Arc<File>,
    /// Where in the file they begin.
    pub(super) offset: u64,
}

impl GuestRam {
    /// The same RAM with these over it.
    ///
    /// # Errors
    /// One that can't be mapped or read, or is outside RAM.
    pub fn with_layers(mut self, layers: &[Layer]) -> Result<Self, RamError> {
        let mut by_size: Vec<_> = layers.iter().collect();
        by_size.sort_by_key(|layer| std::cmp::Reverse(layer.len));
        let (mapped, copied) = by_size.split_at(by_size.len().min(MAPPED_MAX));
        mapped.iter().try_for_each(|layer| self.map_layer(layer))?;
        self.forbid_copies();
        self.watch_layers(mapped);
        self.copy_layers(copied)?;
        let place = |layer: &&Layer| Mapped {
            gpas: layer.gpa..layer.gpa + layer.len,
            file: layer.file.clone(),
            offset: layer.offset,
        };
        let mut places: Vec<_> = mapped.iter().map(place).collect();
        places.sort_by_key(|place| place.gpas.start);
        self.layers = Arc::new(places);
        Ok(self)
    }

    fn map_layer(&self, layer: &Layer) -> Result<(), RamError> {
        let failed = |reason: String| RamError::Map { gpa: layer.gpa, bytes: layer.len, reason };
        let whole =
            [layer.gpa, layer.len, layer.offset].iter().all(|number| number.is_multiple_of(PAGE_SIZE));
        let host = self.host_address(layer.gpa, layer.len).filter(|_| whole && layer.len > 0);
        let host = host.ok_or_else(|| failed("no whole pages of RAM".to_owned()))?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let (fd, offset) = (layer.file.as_raw_fd(), layer.offset as i64);
        // SAFETY: whole pages inside one mapping of guest RAM, which lives as long as the regions; nothing has been put there yet.
        let place = unsafe { libc::mmap(host as *mut _, layer.len as usize, access, flags, fd, offset) };
        if place == libc::MAP_FAILED { Err(failed(io::Error::last_os_error().to_string())) } else { Ok(()) }
    }

    /// In the order of the files, in which small pieces are neighbours.
    fn copy_layers(&self, layers: &[&Layer]) -> Result<(), RamError> {
        let mut parts: Vec<_> = layers.iter().flat_map(|layer| parts(layer)).collect();
        parts.sort_by_key(|part| (part.file.as_raw_fd(), part.offset));
        let mut buf = vec![0; if parts.is_empty() { 0 } else { COPIED as usize }];
        let mut rest = parts.as_slice();
        while !rest.is_empty() {
            let (together, after) = rest.split_at(neighbours(rest));
            self.copy_together(together, &mut buf)?;
            rest = after;
        }
        Ok(())
    }

    /// Parts that lie close together in one file.
    fn copy_together(&self, parts: &[Layer], buf: &mut [u8]) -> Result<(), RamError> {
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
        let bytes = &mut buf[..(last.offset + last.len - first.offset) as usize];
        let failed = |part: &Layer| {
            let (gpa, bytes) = (part.gpa, part.len);
            move |error: io::Error| RamError::Map { gpa, bytes, reason: error.to_string() }
        };
        first.file.read_exact_at(bytes, first.offset).map_err(failed(first))?;
        let writer = self.writer();
        parts.iter().try_for_each(|part| {
            let start = (part.offset - first.offset) as usize;
            writer.write(part.gpa, &bytes[start..start + part.len as usize]).map_err(failed(part))
        })
    }

    /// As [`GuestRam::watched`], for each file.
    fn watch_layers(&mut self, mapped: &[&Layer]) {
        let mut by_file: Vec<_> = mapped.to_vec();
        by_file.sort_by_key(|layer| layer.file.as_raw_fd());
        for of_one in by_file.chunk_by(|one, next| Arc::ptr_eq(one.file, next.file)) {
            let place = |layer: &&Layer| {
                let start = self.host_address(layer.gpa, layer.len)? as usize;
                Some(start..start + layer.len as usize)
            };
            let ranges = of_one.iter().filter_map(place).collect();
            let end = of_one.iter().map(|layer| layer.offset + layer.len).max().unwrap_or(0);
            self.watches.push(Arc::new(lost_ram::watch(of_one[0].path, of_one[0].file, ranges, end)));
        }
    }

    /// Whether some of these bytes are mapped from another file than the first.
    pub(super) fn is_layered(&self, gpas: Range<u64>) -> bool {
        self.layers_in(gpas).next().is_some()
    }

    /// What lies over the first file among these bytes.
    pub(super) fn layers_in(&self, gpas: Range<u64>) -> impl Iterator<Item = &Mapped> {
        let next = self.layers.partition_point(|layer| layer.gpas.end <= gpas.start);
        self.layers[next..].iter().take_while(move |layer| layer.gpas.start < gpas.end)
    }
}

/// None longer than what is read at a time.
fn parts<'a>(layer: &Layer<'a>) -> impl Iterator<Item = Layer<'a>> {
    let layer = *layer;
    (0..layer.len).step_by(COPIED as usize).map(move |at| Layer {
        gpa: layer.gpa + at,
        offset: layer.offset + at,
        len: (layer.len - at).min(COPIED),
        ..layer
    })
}

/// How many of these, the first at least, are read at once.
fn neighbours(parts: &[Layer]) -> usize {
    let first = &parts[0];
    let mut end = first.offset;
    let is_near = |part: &&Layer| {
        let gap = part.offset.saturating_sub(end);
        end = part.offset + part.len;
        Arc::ptr_eq(part.file, first.file) && gap <= GAP && end - first.offset <= COPIED
    };
    parts.iter().take_while(is_near).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::FileRange;
    use vm_memory::{Bytes, GuestAddress};

    fn file(byte: u8, pages: u64) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![byte; (pages * PAGE_SIZE) as usize], 0).unwrap();
        Arc::new(file)
    }

    fn base(pages: u64) -> GuestRam {
        let range = FileRange { gpa: 0, len: pages * PAGE_SIZE, offset: 0 };
        GuestRam::from_snapshot(file(1, pages).try_clone().unwrap(), &[range]).unwrap()
    }

    fn layer(file: &Arc<File>, page: u64) -> Layer<'_> {
        at(file, page, page)
    }

    /// A page, and where in the file it is.
    fn at(file: &Arc<File>, page: u64, packed: u64) -> Layer<'_> {
        let (gpa, offset) = (page * PAGE_SIZE, packed * PAGE_SIZE);
        Layer { file, path: Path::new("child"), gpa, len: PAGE_SIZE, offset }
    }

    fn byte(ram: &GuestRam, page: u64) -> u8 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }

    #[test]
    fn layers_lie_over_the_first() {
        let child = file(2, 4);
        let ram = base(8).with_layers(&[layer(&child, 3), layer(&child, 1)]).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|page| byte(&ram, page)), [1, 2, 1, 2, 1]);
        assert!(ram.is_layered(PAGE_SIZE..2 * PAGE_SIZE) && !ram.is_layered(2 * PAGE_SIZE..3 * PAGE_SIZE));
        ram.memory().write_obj(9u8, GuestAddress(PAGE_SIZE)).unwrap();
        let mut on_disk = [0];
        child.read_exact_at(&mut on_disk, PAGE_SIZE).unwrap();
        assert_eq!(on_disk, [2]);
    }

    /// The first is one hole: what lies over it is not.
    #[test]
    fn a_layer_over_a_hole_is_read() {
        let hole = tempfile::tempfile().unwrap();
        hole.set_len(8 * PAGE_SIZE).unwrap();
        let range = FileRange { gpa: 0, len: 8 * PAGE_SIZE, offset: 0 };
        let child = file(2, 4);
        let ram = GuestRam::from_snapshot(hole, &[range]).unwrap().with_layers(&[layer(&child, 3)]).unwrap();
        let mut page = vec![0; PAGE_SIZE as usize];
        assert!(!ram.read_touched(0, &mut page).unwrap());
        assert!(ram.read_touched(3 * PAGE_SIZE, &mut page).unwrap());
        assert_eq!(page[0], 2);
    }

    #[test]
    fn more_pieces_than_there_are_mappings_are_read_instead() {
        let (count, pages) = (MAPPED_MAX as u64 + 1000, 2 * (MAPPED_MAX as u64 + 1000));
        let child = file(2, count);
        // Each has a number of its own, and they are packed.
        (0..count).for_each(|page| child.write_all_at(&[page as u8 | 0x80], page * PAGE_SIZE).unwrap());
        let pieces: Vec<_> = (0..count).map(|number| at(&child, 2 * number, number)).collect();
        let ram = base(pages).with_layers(&pieces).unwrap();
        let expected = |page| if page % 2 == 0 { (page / 2) as u8 | 0x80 } else { 1 };
        assert!((0..pages).all(|page| byte(&ram, page) == expected(page)));
    }

    #[test]
    fn what_lies_close_together_is_read_at_once_and_no_more_than_may_be() {
        let (child, other) = (file(2, 1), file(2, 1));
        let count = |parts: &[Layer]| neighbours(parts);
        let near: Vec<_> = (0..300).map(|page| at(&child, page, page)).collect();
        assert_eq!(count(&near), 256);
        assert_eq!(count(&[at(&child, 0, 0), at(&child, 1, 17), at(&child, 2, 40)]), 2);
        assert_eq!(count(&[at(&child, 0, 0), at(&other, 1, 1)]), 1);
        let long = Layer { len: 2 * COPIED + PAGE_SIZE, ..at(&child, 0, 7) };
        let lens: Vec<_> = parts(&long).map(|part| (part.offset / PAGE_SIZE, part.len / PAGE_SIZE)).collect();
        assert_eq!(lens, [(7, 256), (263, 256), (519, 1)]);
    }

    #[test]
    fn a_layer_outside_ram_is_refused() {
        let child = file(2, 16);
        let error = base(8).with_layers(&[layer(&child, 9)]).unwrap_err();
        assert!(error.to_string().contains("no whole pages of RAM"), "{error}");
    }
}
