//! The image kernel: one that is shown the kernel that sleeps, as its `/proc/vmcore`.
//!
//! In: who sleeps, and a kernel that is about to run. Out: that kernel with read-only windows on the sleeper's RAM and notes, and with
//! a disk to write them to. Holds: it can't write the sleeper's RAM; what it wrote has its file's name once it is whole, and no sooner.
//!
//! ```text
//! in the image kernel's memory
//! 0             its own RAM
//! next GiB      ELF headers and notes, elfcorehdr=
//! GiB after it  the sleeper's RAM, each range at this address + its GPA
//! ```

use super::SwitchError;
use super::sleeper::{Ready, Sleeper};
use crate::boot::BootSource;
use crate::disk::{Disk, DiskFile, EngineChoice};
use crate::layout;
use crate::ram::{GuestRam, Window};
use crate::save;
use crate::virtio::{DeviceState, SlotState};
use devices::virtio::{BlkState, MmioState};
use snapshot::publish::NewFile;
use snapshot::{NOTES_MAX, UnverifiedSnapshot};
use std::io;
use std::path::PathBuf;

/// What an image kernel is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageWish {
    /// The snapshot that it writes; none if it only looks.
    pub write_to: Option<PathBuf>,
}

/// The id and the serial number of the disk that an image kernel writes to.
pub const IMAGE_DISK: &str = "image";

const GIB: u64 = 1 << 30;

/// The file that an image kernel writes.
pub(super) struct Image(Option<NewFile>);

/// Where the image kernel finds the sleeper.
struct Windows {
    headers: u64,
    ram: u64,
}

impl Windows {
    /// Above this much RAM of its own.
    fn above(memory: u64) -> Self {
        let end = layout::ram_ranges(memory).iter().map(|(start, len)| start + len).max().unwrap_or(0);
        let headers = end.max(layout::MMIO_HOLE_END).next_multiple_of(GIB);
        Self { headers, ram: headers + GIB }
    }
}

/// Tells the kernel of the windows on a machine with `seen` bytes of RAM; its own has `memory`.
pub(super) fn announce(source: &BootSource, memory: u64, seen: u64) -> BootSource {
    let windows = Windows::above(memory);
    let ram = layout::ram_ranges(seen).into_iter().map(|(gpa, len)| (windows.ram + gpa, len));
    let headers = (windows.headers, NOTES_MAX + layout::PAGE_SIZE);
    let cmdline = format!("{} elfcorehdr={:#x}", source.cmdline, windows.headers);
    BootSource { cmdline, reserved: std::iter::once(headers).chain(ram).collect(), ..source.clone() }
}

/// The place of the disk among the devices; how long it is turns out when the sleeper stands still.
pub(super) fn disk_slot() -> SlotState {
    let device = BlkState { size: 512, read_only: false, serial: IMAGE_DISK.into(), unfinished: Vec::new() };
    SlotState { id: IMAGE_DISK.into(), device: DeviceState::Blk(MmioState { registers: None, device }) }
}

/// Opens the windows on who has fallen asleep, and makes the disk.
pub(super) fn show(ready: &mut Ready, asleep: &Sleeper, wish: &ImageWish) -> Result<Image, SwitchError> {
    let windows = Windows::above(ready.state.shape.memory);
    let ram = asleep.ram()?;
    let hdr = save::elfcorehdr(&asleep.state, &ram, &asleep.disks, windows.headers, windows.ram)?;
    let headers = GuestRam::of_bytes(&hdr.bytes).map_err(SwitchError::Window)?;
    let seen = [(windows.headers, headers), (windows.ram, ram)];
    let seen = seen.map(|(base, ram)| Window { base, memory: ram.memory().clone() });
    ready.ram = ready.ram.clone().with_windows(seen.into());
    let Some(path) = &wish.write_to else { return Ok(Image(None)) };
    let file = NewFile::create(path)?;
    let disk = disk(&file, hdr.vmcore_len)?;
    for slot in ready.state.board.virtio.iter_mut().filter(|slot| slot.id == IMAGE_DISK) {
        if let DeviceState::Blk(state) = &mut slot.device {
            state.device.size = disk.file.size;
        }
    }
    ready.disks.push(disk);
    Ok(Image(Some(file)))
}

fn disk(file: &NewFile, len: u64) -> Result<Disk, SwitchError> {
    let failed = |source: io::Error| SwitchError::ImageFile { path: file.target().to_owned(), source };
    file.file().set_len(len).map_err(failed)?;
    let file = file
        .file()
        .try_clone()
        .map_err(failed)
        .and_then(|open| DiskFile::of(open, false, file.target()).map_err(SwitchError::ImageDisk))?;
    Ok(Disk { id: IMAGE_DISK.into(), file, engine: EngineChoice::Auto })
}

impl Image {
    /// Checks all of what was written and gives it its name. `None` if there was nothing to write.
    pub(super) fn finish(self) -> Result<Option<PathBuf>, SwitchError> {
        let Some(file) = self.0 else { return Ok(None) };
        let path = file.target().to_owned();
        let snapshot = file
            .file()
            .try_clone()
            .map_err(|source| SwitchError::ImageFile { path: path.clone(), source })?;
        let snapshot = UnverifiedSnapshot::of(snapshot, path.clone()).verify()?;
        snapshot.verify_ram(&mut |_, _| {})?;
        file.publish()?;
        Ok(Some(path))
    }

    /// Gives it its name unchecked, for one who checks it.
    pub(super) fn publish(self) -> Result<PathBuf, SwitchError> {
        let file = self.0.ok_or(SwitchError::NoImage)?;
        let path = file.target().to_owned();
        file.publish()?;
        Ok(path)
    }
}
