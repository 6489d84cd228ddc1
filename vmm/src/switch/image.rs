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

use super::sleeper::{Ready, Sleeper};
use super::{Awake, Kernels, SwitchError};
use crate::boot::BootSource;
use crate::clock::TimePolicy;
use crate::disk::{Disk, DiskFile, EngineChoice};
use crate::layout;
use crate::load;
use crate::ram::{GuestRam, Window};
use crate::save;
use crate::start;
use crate::stub::Report;
use crate::virtio::{DeviceState, SlotState};
use devices::virtio::{BlkState, MmioState};
use kvm_ioctls::Kvm;
use snapshot::publish::NewFile;
use snapshot::{NOTES_MAX, Snapshot, UnverifiedSnapshot};
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

/// What an image kernel is shown and writes.
pub(super) struct Image {
    /// The kernel that it is shown.
    of: String,
    /// None if it only looks.
    file: Option<NewFile>,
}

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
    let of = asleep.name.clone();
    let Some(path) = &wish.write_to else { return Ok(Image { of, file: None }) };
    let file = NewFile::create(path)?;
    let disk = disk(&file, hdr.vmcore_len)?;
    for slot in ready.state.board.virtio.iter_mut().filter(|slot| slot.id == IMAGE_DISK) {
        if let DeviceState::Blk(state) = &mut slot.device {
            state.device.size = disk.file.size;
        }
    }
    ready.disks.push(disk);
    Ok(Image { of, file: Some(file) })
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

fn written(file: &NewFile) -> Result<UnverifiedSnapshot, SwitchError> {
    let path = file.target().to_owned();
    match file.file().try_clone() {
        Ok(open) => Ok(UnverifiedSnapshot::of(open, path)),
        Err(source) => Err(SwitchError::ImageFile { path, source }),
    }
}

impl Kernels {
    /// Gives what an image kernel wrote its name, all of it checked, as it powers the machine off. `None` if it was given nothing
    /// to write to, or is none.
    ///
    /// # Errors
    /// It is no whole snapshot, or can't be named.
    pub fn finish_image(&mut self) -> Result<Option<PathBuf>, SwitchError> {
        let image = self.awake.as_mut().and_then(|awake| awake.image.take());
        image.map_or(Ok(None), Image::finish)
    }

    /// Whether the one that is awake is an image kernel.
    pub fn is_image_kernel(&self) -> bool {
        self.image().is_some()
    }

    /// Refuses to keep an image kernel, in a file or for another: what it is shown is no part of it. Nor is one kept that is on trial.
    ///
    /// # Errors
    /// The one that is awake is one.
    pub fn check_can_be_kept(&self) -> Result<(), SwitchError> {
        match self.image() {
            Some(_) => Err(SwitchError::ImageKernel(self.origin().0.to_owned())),
            None => self.expect_no_trial(),
        }
    }

    pub(super) fn image(&self) -> Option<&Image> {
        self.awake.as_ref().and_then(|awake| awake.image.as_ref())
    }

    /// Restarts the machine from what an image kernel wrote: the restore stub checks it and puts its RAM in place. Whoever slept is that
    /// machine, and wakes up no more. Returns what the stub said.
    ///
    /// # Errors
    /// There is no image, or it is refused; then nobody is awake.
    pub fn restart(&mut self) -> Result<String, SwitchError> {
        let Awake { machine, image, .. } = self.awake.take().ok_or(SwitchError::Ending)?;
        machine.dismantle();
        let image = image.ok_or(SwitchError::NoImage)?;
        let index = self.find(image.of())?;
        let (snapshot, ram, report) = image.overlay(&self.kvm)?;
        let state = load::state(&snapshot)?;
        load::check_host(&self.kvm, &snapshot, &state)?;
        let sleeper = &self.asleep[index];
        let (name, disks, source) = (sleeper.name.clone(), sleeper.disks.clone(), snapshot.path().to_owned());
        let (time, generation) = (TimePolicy::Advance, Some(start::generation()?));
        let ready =
            Ready { name, source, state, ram, time, disks, generation, on_trial: false, is_new: false };
        self.run(ready, None)?;
        self.asleep.remove(index);
        Ok(report.line)
    }
}

impl Image {
    /// The kernel that is seen through the windows.
    pub(super) fn of(&self) -> &str {
        &self.of
    }

    /// The file that is lost if this is dropped.
    pub(super) fn unfinished(&self) -> Option<PathBuf> {
        self.file.as_ref().map(|file| file.target().to_owned())
    }

    /// Checks all of what was written and gives it its name. `None` if there was nothing to write.
    pub(super) fn finish(self) -> Result<Option<PathBuf>, SwitchError> {
        let Some(file) = self.file else { return Ok(None) };
        written(&file)?.verify()?.verify_ram(&mut |_, _| {})?;
        let path = file.target().to_owned();
        file.publish()?;
        Ok(Some(path))
    }

    /// Has the restore stub check all of it and put its RAM in place, and gives it its name if it was taken.
    pub(super) fn overlay(self, kvm: &Kvm) -> Result<(Snapshot, GuestRam, Report), SwitchError> {
        let file = self.file.ok_or(SwitchError::NoImage)?;
        let overlaid = load::overlaid(kvm, written(&file)?)?;
        file.publish()?;
        Ok(overlaid)
    }
}
