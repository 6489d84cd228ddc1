//! The bzImage, a kernel that unpacks itself.
//!
//! In: a file with a setup header. Out: its protected-mode part in RAM and the header, which goes into the zero page.
//! Holds: the kernel is entered at its 64-bit entry, and `init_size` bytes from its load address are RAM.
//!
//! ```text
//! 0      boot sector; setup header at 0x1f1
//! 0x200  rest of the setup code, `setup_sects` sectors; the version string is in here
//! …      protected-mode code: 32-bit entry at 0, 64-bit entry at 0x200
//! ```

use super::file::Image;
use super::{KernelError, KernelIdentity, LoadedKernel, Protocol, ProtocolChoice, printable};
use crate::layout;
use devices::Memory;
use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

// Linux Documentation/arch/x86/boot.rst, "The real-mode kernel header".
const HEADER: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const SECTOR: u64 = 512;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
/// Protocol 2.12, the first with `xloadflags`.
const OLDEST_VERSION: u16 = 0x020c;
const VERSION_MAX: u64 = 256;

/// Whether a file that begins with `head` is a bzImage.
pub(super) fn is_one(head: &[u8]) -> bool {
    head.get(0x1fe..0x200) == Some(&BOOT_FLAG.to_le_bytes()) && head.get(0x202..0x206) == Some(b"HdrS")
}

/// Loads the kernel where it prefers to run.
pub(super) fn load(
    image: &Image<'_>,
    mem: &Memory,
    choice: ProtocolChoice,
    ram: u64,
) -> Result<LoadedKernel, KernelError> {
    let header = header(image)?;
    check(image, &header, choice)?;
    let setup = setup_size(&header);
    let size = payload_size(image, &header, setup)?;
    let (start, init_size) = (header.pref_address, u64::from(header.init_size));
    let end = start.saturating_add(size.max(init_size));
    image.check_end(end, ram)?;
    image.copy(setup, size, mem, start)?;
    let identity = KernelIdentity { version: version(image, &header, setup)?, build_id: None };
    let protocol = Protocol::Linux64;
    Ok(LoadedKernel { entry: start + ENTRY_64, protocol, end, header: Some(header), identity })
}

/// The setup header, and zeros for what is newer than the kernel: its length is in the second byte of its jump.
fn header(image: &Image<'_>) -> Result<setup_header, KernelError> {
    let mut header: setup_header = image.read(HEADER)?;
    let [_, jump] = header.jump.to_le_bytes();
    let len = (0x202 - HEADER as usize) + usize::from(jump);
    if let Some(beyond) = header.as_mut_slice().get_mut(len..) {
        beyond.fill(0);
    }
    Ok(header)
}

fn check(image: &Image<'_>, header: &setup_header, choice: ProtocolChoice) -> Result<(), KernelError> {
    let (version, start) = (header.version, header.pref_address);
    let reason = if choice == ProtocolChoice::Pvh {
        "a bzImage has no PVH entry; give its ELF vmlinux, or choose the 64-bit protocol".into()
    } else if header.header != MAGIC || version < OLDEST_VERSION {
        format!("its boot protocol is {}.{:02}; expected 2.12 or later", version >> 8, version & 0xff)
    } else if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        "it has no 64-bit entry (XLF_KERNEL_64); expected a kernel for x86-64".into()
    } else if start < layout::HIGH_RAM_START {
        format!("it wants to be loaded at {start:#x}; expected 1 MiB or above")
    } else {
        return Ok(());
    };
    Err(image.unusable(reason))
}

/// Bytes before the protected-mode code; a count of 0 means 4, for the sake of very old files.
fn setup_size(header: &setup_header) -> u64 {
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    (sectors + 1) * SECTOR
}

/// Bytes from the end of the setup code to the end of the file; at least what the header promises.
fn payload_size(image: &Image<'_>, header: &setup_header, setup: u64) -> Result<u64, KernelError> {
    let promised = u64::from(header.syssize) * 16;
    match image.len().checked_sub(setup) {
        // The count is in units of 16 bytes, rounded up.
        Some(size) if size > ENTRY_64 && size + 16 > promised => Ok(size),
        _ => {
            let (len, whole) = (image.len(), setup + promised);
            Err(image.unusable(format!("it is truncated: {len} bytes; its header says {whole}")))
        }
    }
}

/// The version string, if the header points to one within the setup code.
fn version(image: &Image<'_>, header: &setup_header, setup: u64) -> Result<Option<String>, KernelError> {
    let start = u64::from(header.kernel_version) + SECTOR;
    if header.kernel_version == 0 || start >= setup {
        return Ok(None);
    }
    Ok(printable(&image.bytes(start, VERSION_MAX.min(setup - start))?))
}
