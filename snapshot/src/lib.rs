//! The snapshot file: a 64-bit ELF core with the machine in its notes.
//!
//! In: a machine as plain bytes (registers, named sections, RAM behind [`RamSource`]), or a path. Out: one file that
//! appears under its name whole or not at all, or a [`Snapshot`] whose every byte outside RAM has been checked. Holds:
//! nothing here knows what a VM is, and no file, however hostile, causes a panic or an allocation larger than itself.
//!
//! ```text
//!    0 ┌───────────────────────────────┐
//!      │ ELF header                    │ ELF64, little-endian, ET_CORE, EM_X86_64
//!   64 ├───────────────────────────────┤
//!      │ program header: PT_NOTE       │ 56 bytes each; one PT_LOAD for each RAM range
//!      │ program headers: PT_LOAD …    │ p_paddr = p_vaddr = guest physical address
//!      ├───────────────────────────────┤
//!      │ CORE    NT_PRSTATUS           │ one note per vCPU: gdb, crash and drgn see the registers
//!      │ CORE    …                     │
//!      │ VMMSNAP fixed header          │ magic, version, lengths and CRCs of the other notes, its own CRC
//!      │ VMMSNAP manifest              │ postcard: identity, RAM layout, host needs, table of sections
//!      │ VMMSNAP machine state         │ the sections, one after another; lengths and CRCs are in the manifest
//!      │ VMMSNAP chunk table           │ one 64-bit digest for each MiB of RAM, in address order
//!      │ zeroed note header            │ ends the notes for Linux's /proc/vmcore; not counted in PT_NOTE
//!      │ zeroes                        │ to the next page
//! 4096n├───────────────────────────────┤ p_offset of the first PT_LOAD
//!      │ RAM, range after range        │ holes where it is zero
//!      └───────────────────────────────┘ end of file
//! ```
//!
//! Linux, when it shows such a machine as `/proc/vmcore`, lays the file out anew: notes start at a page boundary, may
//! have others among them, and every offset moves. So no note holds a file offset and no CRC covers the ELF and program
//! headers; these are checked field by field, against the one layout or the other, and against the manifest.
//! [`UnverifiedSnapshot::verify`] reads both.
#![forbid(unsafe_code)]

mod chunk;
mod elf;
mod fault;
mod header;
mod layout;
mod manifest;
mod note;
mod prstatus;
pub mod publish;
mod ram_check;
mod reader;
mod section;
mod writer;

pub use fault::{Fault, OpenError, RamError, VerifyError};
pub use layout::MappedRange;
pub use manifest::{
    About, GenerationId, GuestKernel, HostNeed, Manifest, ManifestError, NeedValue, RamFormat, RamRange,
    SectionEntry,
};
pub use prstatus::Registers;
pub use reader::{RamSummary, Snapshot, UnverifiedSnapshot};
pub use section::{Section, SectionError, SectionRef};
pub use writer::{ChunkContent, Contents, RamSource, Summary, WriteError, write};

/// The format's version; a reader takes its own version only.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes in a page: the alignment of RAM in the file, and the size of the smallest hole.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of RAM under one digest; the last chunk of a range may be shorter.
pub const CHUNK_SIZE: u64 = 1 << 20;
/// The digest's name in the manifest.
pub const DIGEST: &str = "xxh3-64";
/// All notes together are shorter than this: Linux reads those of a `/proc/vmcore` into one `kmalloc`, of which 4 MiB is
/// the largest; and it bounds what a reader allocates.
pub const NOTES_MAX: u64 = 4 << 20;
/// Most RAM ranges of a machine.
pub const RAM_RANGES_MAX: usize = 64;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u32 = 1024;
/// Most bytes of a name or another text in the manifest.
pub const TEXT_MAX: usize = 512;

/// Bytes of the ELF header (ELF-64 object file format, figure 2).
pub(crate) const EHDR_LEN: u64 = 64;
/// Bytes of a program header (ELF-64 object file format, figure 6).
pub(crate) const PHDR_LEN: u64 = 56;
/// Bytes of a note's header: the lengths of name and descriptor, and the type.
pub(crate) const NOTE_HEADER_LEN: u64 = 12;
/// Bytes of the longest ELF header with program headers.
pub(crate) const HEADERS_MAX: u64 = EHDR_LEN + (1 + RAM_RANGES_MAX as u64) * PHDR_LEN;

// The reader tells the two layouts apart by where the notes start: right after the headers, or at the next page.
const _: () = assert!(HEADERS_MAX < PAGE_SIZE);
const _: () = assert!(CHUNK_SIZE.is_multiple_of(PAGE_SIZE));
