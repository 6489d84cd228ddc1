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
//!      │ VMCOREINFO                    │ the guest kernel's own words, if it has any: symbols and offsets for crash and drgn
//!      │ VMMSNAP fixed header          │ magic, version, lengths and CRCs of the other notes, its own CRC
//!      │ VMMSNAP manifest              │ postcard: identity, RAM layout, host needs, table of sections
//!      │ VMMSNAP machine state         │ the sections, one after another; lengths and CRCs are in the manifest
//!      │ VMMSNAP chunk table           │ one 64-bit digest for each MiB of RAM, in address order
//!      │ VMMSNAP seal                  │ if written with a key: a tag over all these notes, a 256-bit digest for each MiB of RAM
//!      │ zeroed note header            │ ends the notes for Linux's /proc/vmcore; not counted in PT_NOTE
//!      │ zeroes                        │ to the next page
//! 4096n├───────────────────────────────┤ p_offset of the first PT_LOAD
//!      │ RAM, range after range        │ holes where it is zero
//!      └───────────────────────────────┘ end of file
//! ```
//!
//! An incremental snapshot has RAM in another form:
//!
//! ```text
//!      │ program header: PT_NOTE       │
//!      │ program header: PT_PACKED     │ of a type between PT_LOOS and PT_HIOS, with no address: to a debugger there is no memory here,
//!      │                               │ since memory that is only the changed part of it would be another machine's
//!      │ … notes, as above             │ the manifest names the parent, and the guest's RAM ranges; the state's section `delta` has the
//!      │                               │ parent's digest, where it was, and a bit for each page of RAM; the chunk table and the seal
//!      │                               │ are of the packed pages, a MiB of them after the other
//! 4096n├───────────────────────────────┤ p_offset of PT_PACKED
//!      │ changed pages                 │ one behind the other, in the order of guest addresses; holes where they are zero
//!      └───────────────────────────────┘ end of file
//! ```
//!
//! Linux, when it shows such a machine as `/proc/vmcore`, lays the file out anew: notes start at a page boundary, may
//! have others among them, and every offset moves. So no note holds a file offset and no CRC covers the ELF and program
//! headers; these are checked field by field, against the one layout or the other, and against the manifest.
//! [`UnverifiedSnapshot::verify`] reads both. The checks are in the `snapshot-format` crate, which the restore stub uses
//! too; here is what needs files and an allocator.
#![forbid(unsafe_code)]

pub mod chain;
mod chunk;
pub mod delta;
mod elfcorehdr;
mod fault;
mod manifest;
mod notes;
mod packed;
mod page_set;
mod prstatus;
pub mod publish;
mod ram_check;
mod ram_writer;
mod reader;
mod seal;
mod section;
mod writer;

pub use chain::{Chain, ChainError, Piece};
pub use delta::{Delta, Parent};
pub use elfcorehdr::Elfcorehdr;
pub use fault::{ChunkPlace, Fault, OpenError, RamError, VerifyError};
pub use manifest::{
    About, GenerationId, GuestKernel, HostNeed, Manifest, ManifestError, NeedValue, RamFormat, SectionEntry,
};
pub use page_set::PageSet;
pub use prstatus::Registers;
pub use reader::{RamSummary, Snapshot, UnverifiedSnapshot};
pub use seal::{KeyError, SealError, SealKey};
pub use section::{Section, SectionError, SectionRef};
pub use snapshot_format::header::HEADER_LEN;
pub use snapshot_format::{
    CHUNK_SIZE, DIGEST, FORMAT_VERSION, MappedRange, NOTES_MAX, PAGE_SIZE, RAM_RANGES_MAX, RamRange,
    VCPUS_MAX,
};
pub use writer::{ChunkContent, Contents, RamSource, Summary, WriteError, write, write_sealed};

/// Most bytes of a name or another text in the manifest.
pub const TEXT_MAX: usize = 512;
