//! What processor the guest sees.
//!
//! In: what KVM can offer on this host, a vCPU's index, the number of vCPUs. Out: the CPUID entries to set. Holds: the
//! guest sees one socket with one thread per core, APIC ids equal to vCPU indices, and neither nested virtualization nor
//! shadow stacks, whose state a snapshot does not carry. A guest restored on another host keeps the entries it was booted with.

use crate::kvm::{During, Ioctl};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2 as Entry,
};
use kvm_ioctls::{Cap, Kvm};
use std::arch::x86_64::__cpuid;
use std::ops::RangeInclusive;
use vmm_sys_util::errno;

/// The leaves with the processor's name: 48 bytes of text (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.4).
const NAME: RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE_TIMER: u32 = 1 << 24;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const MONITOR: u32 = 1 << 3;
const HTT: u32 = 1 << 28;
/// KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// Spinlocks that halt until they are kicked. KVM keeps a kick that comes just before the halt in a latch that it doesn't
/// tell of, so a restored vCPU could sleep for ever.
const PV_UNHALT: u32 = 1 << 7;
/// Its stack pointer is no MSR: KVM tells it as a register of its own only (KVM_REG_GUEST_SSP, Linux 6.18).
const SHADOW_STACK: u32 = 1 << 7;

/// What KVM supports on this host (`KVM_GET_SUPPORTED_CPUID`), with the timer that it has in the in-kernel LAPIC.
///
/// # Errors
/// The failed call.
pub fn supported(kvm: &Kvm) -> Result<Vec<Entry>, Ioctl> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).during("KVM_GET_SUPPORTED_CPUID")?;
    let mut entries = cpuid.as_slice().to_vec();
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE_TIMER } else { 0 };
    }
    entries.iter_mut().filter(|entry| NAME.contains(&entry.function)).for_each(give_name);
    Ok(entries)
}

/// The host's name for its processor, as `lscpu` shows it; KVM leaves it empty.
fn give_name(entry: &mut Entry) {
    if registers(entry) == [0; 4] {
        let host = __cpuid(entry.function);
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (host.eax, host.ebx, host.ecx, host.edx);
    }
}

/// The entries of vCPU `index` out of `count`.
pub fn for_vcpu(supported: &[Entry], index: u32, count: u32) -> Vec<Entry> {
    let mut entries: Vec<Entry> =
        supported.iter().copied().filter(|entry| !is_topology(entry.function)).collect();
    entries.iter_mut().for_each(|entry| adjust(entry, index, count));
    if supported.iter().any(|entry| entry.function >= 0xb && entry.function < 0x4000_0000) {
        entries.extend(topology(0xb, index, count));
    }
    entries
}

/// The entries as the ioctl takes them.
///
/// # Errors
/// More of them than it takes; KVM's own answer would be the same.
pub fn to_kvm(entries: &[Entry]) -> Result<CpuId, Ioctl> {
    CpuId::from_entries(entries).map_err(|_| errno::Error::new(libc::E2BIG)).during("KVM_SET_CPUID2")
}

/// The processor's maker, as leaf 0 spells it.
pub fn vendor(entries: &[Entry]) -> String {
    let Some(leaf) = entries.iter().find(|entry| entry.function == 0) else { return "unknown".to_owned() };
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first thing that a guest with these entries was promised and a host with those can't give: its vendor, or a
/// feature bit.
pub fn first_lacking(promised: &[Entry], supported: &[Entry]) -> Option<String> {
    let (wanted, there) = (vendor(promised), vendor(supported));
    if wanted != there {
        return Some(format!("a processor by {wanted} (this one is by {there})"));
    }
    promised.iter().find_map(|entry| lacking_feature(entry, supported))
}

fn lacking_feature(entry: &Entry, supported: &[Entry]) -> Option<String> {
    let host = supported.iter().find(|e| (e.function, e.index) == (entry.function, entry.index)).copied();
    let host = registers(&host.unwrap_or_default());
    let masks = feature_masks(entry.function, entry.index);
    let lacking =
        registers(entry).into_iter().zip(host).zip(masks).map(|((want, have), mask)| want & !have & mask);
    let (register, bits) =
        ["EAX", "EBX", "ECX", "EDX"].into_iter().zip(lacking).find(|(_, bits)| *bits != 0)?;
    let bit = bits.trailing_zeros();
    let (leaf, index) = (entry.function, entry.index);
    Some(format!(
        "a processor feature: CPUID leaf {leaf:#x}.{index} {register} bit {bit}{}",
        feature(leaf, register, bit)
    ))
}

fn registers(entry: &Entry) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// Which bits of EAX, EBX, ECX and EDX tell of features. Left out are those that follow what the guest does (APIC,
/// OSXSAVE, OSPKE) or that we set ourselves (hypervisor, HTT).
fn feature_masks(leaf: u32, index: u32) -> [u32; 4] {
    match (leaf, index) {
        (1, _) => [0, 0, !(1 << 27 | HYPERVISOR | MONITOR), !(1 << 9 | HTT)],
        (7, 0) => [0, !0, !(1 << 4), !0],
        (7, _) => [!0, !0, 0, !0],
        (0xd, 0) => [!0, 0, 0, !0],
        (0xd, 1) => [!0, 0, 0, 0],
        (0x8000_0001, _) => [0, 0, !0, !(1 << 9)],
        (0x8000_0008, _) => [0, !0, 0, 0],
        _ => [0; 4],
    }
}

/// The names of features that are missed most often.
fn feature(leaf: u32, register: &str, bit: u32) -> String {
    let name = match (leaf, register, bit) {
        (1, "ECX", 12) => "fma",
        (1, "ECX", 17) => "pcid",
        (1, "ECX", 21) => "x2apic",
        (1, "ECX", 24) => "tsc_deadline_timer",
        (1, "ECX", 26) => "xsave",
        (1, "ECX", 28) => "avx",
        (1, "ECX", 30) => "rdrand",
        (7, "EBX", 0) => "fsgsbase",
        (7, "EBX", 5) => "avx2",
        (7, "EBX", 16) => "avx512f",
        (7, "EBX", 18) => "rdseed",
        (7, "EBX", 20) => "smap",
        (7, "ECX", 3) => "pku",
        (7, "ECX", 16) => "la57",
        (0xd, "EAX", 1) => "xsavec",
        (0xd, "EAX", 3) => "xsaves",
        (0x8000_0001, "EDX", 26) => "1 GiB pages",
        (0x8000_0001, "EDX", 27) => "rdtscp",
        _ => return String::new(),
    };
    format!(" ({name})")
}

/// Extended topology leaves: the host's are replaced (0xb) or left out (0x1f, 0x8000_0026).
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn adjust(entry: &mut Entry, index: u32, count: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | count << 16 | index << 24;
            entry.ecx &= !(VMX | MONITOR);
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Intel's deterministic cache parameters: cores in the package; the last cache is shared by all of them.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | (count - 1) << 26 | sharing << 14;
        }
        KVM_FEATURES => entry.eax &= !PV_UNHALT,
        7 if entry.index == 0 => entry.ecx &= !SHADOW_STACK,
        0x8000_0001 => entry.ecx &= !SVM,
        // AMD: number of threads in the package, and bits of the APIC id that number them.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (count - 1) | id_bits(count) << 12,
        // AMD's cache topology: as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC id, core id with one thread each, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
        _ => {}
    }
}

/// Leaf 0xb: an SMT level with one thread, a core level with all vCPUs (Intel SDM vol. 2A, CPUID).
fn topology(function: u32, index: u32, count: u32) -> [Entry; 3] {
    let level = |number: u32, kind: u32, shift: u32, processors: u32| Entry {
        function,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: number | kind << 8,
        edx: index,
        ..Default::default()
    };
    [level(0, 1, 0, 1), level(1, 2, id_bits(count), count), level(2, 0, 0, 0)]
}

fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> Entry {
        Entry {
            function,
            eax: 0x1c06_3163,
            ebx: 0xffff_ffff,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn a_processor_has_the_hosts_name_unless_kvm_gives_it_one() {
        let mut named = leaf(0x8000_0002);
        give_name(&mut named);
        assert_eq!(registers(&named), registers(&leaf(0x8000_0002)));
        let mut nameless = Entry { function: 0x8000_0002, ..Default::default() };
        give_name(&mut nameless);
        assert_eq!(nameless.eax, __cpuid(0x8000_0002).eax);
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id() {
        for index in 0..16 {
            let entries = for_vcpu(&[leaf(1), leaf(0xb)], index, 16);
            assert_eq!(entries[0].ebx >> 24, index);
            assert_eq!(entries[0].ebx >> 16 & 0xff, 16);
            let core = entries.iter().find(|e| e.function == 0xb && e.index == 1).unwrap();
            assert_eq!((core.eax, core.ebx, core.edx), (4, 16, index));
        }
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_named() {
        let with = |ebx| [leaf(0), Entry { function: 7, ebx, ..Default::default() }];
        assert_eq!(first_lacking(&with(1 << 3), &with(1 << 3 | 1 << 5)), None);
        let lacking = first_lacking(&with(1 << 16), &with(1 << 5)).unwrap();
        assert!(lacking.contains("leaf 0x7.0 EBX bit 16 (avx512f)"), "{lacking}");
        let other = Entry { ebx: 7, ..leaf(0) };
        assert!(first_lacking(&[leaf(0)], &[other]).unwrap().contains("by"));
    }

    #[test]
    fn what_a_snapshot_does_not_carry_is_hidden() {
        let entries = for_vcpu(&[leaf(1), leaf(0x8000_0001), leaf(7)], 0, 1);
        assert_eq!(entries[0].ecx & VMX, 0);
        assert_eq!(entries[1].ecx & SVM, 0);
        assert_eq!(entries[2].ecx & SHADOW_STACK, 0);
    }
}
