//! Bare-metal guests of our own, small enough to run on any KVM.
//!
//! In: nothing. Out: ELF files that `vmm run --kernel` takes, by PVH or by the 64-bit entry. Holds: they are in this
//! program; nothing is fetched. What each prints and which `key=value` words it knows on its command line stands at the
//! top of its source in `guests/`.

macro_rules! guests {
    ($($(#[$doc:meta])* $constant:ident = $name:literal;)*) => {
        $($(#[$doc])* pub const $constant: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/", $name));)*
        const ALL: &[(&str, &[u8])] = &[$(($name, $constant)),*];
    };
}

guests! {
    /// Counts in RAM and prints `tick <n>`.
    COUNTER = "counter";
    /// Dirties pages of a memory pattern at a rate and checks them.
    DIRTY = "dirty";
    /// Asks a virtio entropy device for bytes.
    ENTROPY = "entropy";
    /// Writes to a port, and nothing else.
    PORT = "port";
    /// Powers off, resets, panics, exits or triple-faults, as told.
    POWER = "power";
    /// Holds patterns in general, x87, SSE, AVX and AVX-512 registers.
    REGISTERS = "registers";
    /// Works with a scattered part of the memory that it has in use.
    SCATTER = "scatter";
    /// Counts on every CPU.
    SMP = "smp";
    /// Checks local APIC timers, kvmclock and the TSC.
    TIMER = "timer";
}

/// Every guest: its name and its ELF file.
pub fn all() -> &'static [(&'static str, &'static [u8])] {
    ALL
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
    use object::{LittleEndian, elf};

    #[test]
    fn every_source_is_embedded() {
        let sources = std::fs::read_dir("guests").unwrap().map(|entry| entry.unwrap().path());
        let programs = sources.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
        let mut names: Vec<_> =
            programs.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        names.sort();
        assert_eq!(names, all().iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }

    #[test]
    fn both_entries_of_every_guest_are_in_its_segment() {
        for (name, bytes) in all() {
            let file = ElfFile64::<LittleEndian>::parse(*bytes).unwrap();
            let headers = file.elf_program_headers();
            let load = headers.iter().find(|header| header.p_type(LittleEndian) == elf::PT_LOAD).unwrap();
            let start = load.p_paddr(LittleEndian);
            let segment = start..start + load.p_filesz(LittleEndian);
            let notes = headers.iter().filter_map(|header| header.notes(LittleEndian, *bytes).unwrap());
            let pvh = notes.flatten().flatten().find(|note| note.name() == b"Xen").unwrap();
            let pvh = u32::from_le_bytes(pvh.desc().try_into().unwrap());
            assert!(segment.contains(&u64::from(pvh)), "{name}: PVH entry {pvh:#x}");
            assert!(segment.contains(&file.elf_header().e_entry(LittleEndian)), "{name}: 64-bit entry");
        }
    }
}
