//! Loads a kernel and its initrd into guest RAM.
//!
//! In: two files that anyone may have written, and zero-filled RAM. Out: where the kernel starts, by which protocol,
//! what it occupies, and who it is. Holds: nothing is written below 1 MiB or outside RAM, no more of a file is read
//! than fits, and each refusal is one line that names the file, what was found and what was expected.

mod bzimage;
mod elf;
mod file;

use crate::layout;
use devices::Memory;
use file::Image;
use linux_loader::bootparam::setup_header;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

const KERNEL: &str = "a Linux kernel for x86-64 (bzImage or ELF vmlinux)";

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Long mode with RSI at the zero page (Linux `Documentation/arch/x86/boot.rst`, "64-bit boot protocol").
    Linux64,
    /// 32-bit protected mode without paging, EBX at `hvm_start_info` (Xen `docs/misc/pvh.pandoc`).
    Pvh,
}

/// Which protocol is wanted. A bzImage has only the 64-bit one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProtocolChoice {
    /// PVH for an ELF file with a PVH note, else the 64-bit protocol.
    #[default]
    Auto,
    /// The 64-bit protocol.
    Linux64,
    /// PVH; an error for a kernel without the note.
    Pvh,
}

/// Who a kernel says it is, for the snapshot's manifest. The text is the file's own word, made printable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelIdentity {
    /// Release, builder and build, as `/proc/version` has it after `Linux version `; `None` if the file holds none.
    pub version: Option<String>,
    /// The GNU build-id, if the file has that note. A bzImage keeps it inside its compressed part.
    pub build_id: Option<Vec<u8>>,
}

/// The release in a kernel's version, as `uname -r` has it: what stands before the first space.
pub fn release(version: &str) -> &str {
    version.split_once(' ').map_or(version, |(release, _)| release)
}

/// A kernel in guest RAM.
#[derive(Clone, Debug)]
pub struct LoadedKernel {
    /// Guest physical address of its first instruction.
    pub entry: u64,
    /// How it is entered.
    pub protocol: Protocol,
    /// One past the last byte it needs before it has read its memory map.
    pub end: u64,
    /// The setup header of a bzImage.
    pub header: Option<setup_header>,
    /// Who it is.
    pub identity: KernelIdentity,
}

/// An initrd in guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Guest physical address, page-aligned.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Why a kernel or an initrd was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be opened.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{path} is {found}; expected {expected}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// The file is of the right kind, but damaged or of a variant that cannot be booted.
    #[error("{path} cannot be booted: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// The kernel needs more RAM than there is below 3 GiB.
    #[error("{path} needs RAM up to {}, and the machine has {}", show(*.end), show(*.ram))]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// One past the last address it needs.
        end: u64,
        /// Where RAM ends, at most 3 GiB.
        ram: u64,
    },
    /// The initrd does not fit between the kernel and the end of what the kernel can reach.
    #[error("the initrd {path} has {}, and between the kernel and the end of RAM there are {}", show(*.size), show(*.room))]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes there would be for it.
        room: u64,
    },
}

/// A number of bytes for a person: exact below 1 MiB, rounded up to whole MiB from there.
fn show(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{bytes} bytes") } else { format!("{} MiB", bytes.div_ceil(1 << 20)) }
}

/// Loads the kernel at `path`. `ram` is where RAM below 3 GiB ends; `mem` is zero-filled.
///
/// # Errors
/// A file that is no x86-64 kernel, a damaged one, one that doesn't fit, or one without the protocol wanted.
pub fn load(
    mem: &Memory,
    path: &Path,
    choice: ProtocolChoice,
    ram: u64,
) -> Result<LoadedKernel, KernelError> {
    let image = Image::open(path, KERNEL)?;
    let head = image.bytes(0, image.len().min(1024))?;
    if head.starts_with(b"\x7fELF") {
        elf::load(&image, mem, choice, ram)
    } else if bzimage::is_one(&head) {
        bzimage::load(&image, mem, choice, ram)
    } else {
        Err(image.wrong(describe(&head), KERNEL))
    }
}

/// Puts the initrd at `path` as high as the kernel can reach it, so that the kernel may grow towards it.
///
/// # Errors
/// An unreadable or empty file, or one that doesn't fit.
pub fn load_initrd(
    mem: &Memory,
    path: &Path,
    kernel: &LoadedKernel,
    ram: u64,
) -> Result<Initrd, KernelError> {
    let image = Image::open(path, "an initrd")?;
    let limit = kernel.header.map_or(ram, |header| ram.min(u64::from(header.initrd_addr_max) + 1));
    let start = kernel.end.next_multiple_of(layout::PAGE_SIZE);
    let address = limit.saturating_sub(image.len()) & !(layout::PAGE_SIZE - 1);
    if image.len() > limit || address < start {
        let room = limit.saturating_sub(start);
        return Err(KernelError::InitrdTooLarge { path: path.into(), size: image.len(), room });
    }
    image.copy(0, image.len(), mem, address)?;
    Ok(Initrd { address, size: image.len() })
}

/// What a file that is no kernel seems to be, by its first bytes.
fn describe(head: &[u8]) -> String {
    const MAGICS: [(usize, &[u8], &str); 7] = [
        (0x38, b"ARM\x64", "an arm64 Image"),
        (0x38, b"RSC\x05", "a RISC-V Image"),
        (0, b"\x1f\x8b", "gzip-compressed data"),
        (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
        (0, b"\xfd7zXZ\0", "xz-compressed data"),
        (0, b"070701", "a cpio archive (an initrd?)"),
        (0, b"!<arch>\n", "an ar archive (a Debian package?)"),
    ];
    let holds = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, name)) = MAGICS.iter().find(|(at, magic, _)| holds(*at, magic)) {
        return (*name).into();
    }
    if head.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return "a text file".into();
    }
    format!("data that begins with {:02x?}", &head[..head.len().min(8)])
}

/// Bytes up to the first NUL or newline as printable ASCII; `None` if there is nothing.
fn printable(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| matches!(byte, 0 | b'\n')).unwrap_or(bytes.len());
    let show = |byte: &u8| if matches!(byte, b' '..=b'~') { char::from(*byte) } else { '?' };
    (end > 0).then(|| bytes[..end].iter().map(show).collect())
}

#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod tests;
