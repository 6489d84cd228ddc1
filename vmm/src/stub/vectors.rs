//! Which of the stub's programs a host's processor can run.
//!
//! In: what KVM supports, the stub's vCPU. Out: a program, and a vCPU on which it may use its registers. Holds: where KVM won't have a vCPU
//! use them, the program needs nothing that x86-64 doesn't have.

use kvm_bindings::{kvm_cpuid_entry2, kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use restore_stub::Vectors;

// SDM volume 2, CPUID: leaf 1 ECX, leaf 7 EBX.
const XSAVE: u32 = 1 << 26;
const AVX: u32 = 1 << 28;
const AVX2: u32 = 1 << 5;
const AVX512F: u32 = 1 << 16;
/// SDM volume 1, 13.3: x87, SSE and AVX state; and that with opmasks and the upper and further registers of AVX-512.
const WITH_AVX: u64 = 0x7;
const WITH_AVX512: u64 = 0xe7;
/// CR4.OSXSAVE (SDM volume 3, 2.5).
const OSXSAVE: u64 = 1 << 18;

/// Opens the widest registers that there are, up to `widest`, to this vCPU, whose CPUID has been set. Returns which they are, and the
/// bits of CR4 that belong to it.
pub(super) fn open(vcpu: &VcpuFd, supported: &[kvm_cpuid_entry2], widest: Vectors) -> (Vectors, u64) {
    let mut offered = offered(supported).into_iter().filter(|(vectors, _)| *vectors <= widest);
    let choice = offered.find(|(_, xcr0)| vcpu.set_xcrs(&only(*xcr0)).is_ok());
    choice.map_or((Vectors::Sse2, 0), |(vectors, _)| (vectors, OSXSAVE))
}

/// What the processor has, the widest first, and the XCR0 for it.
fn offered(supported: &[kvm_cpuid_entry2]) -> Vec<(Vectors, u64)> {
    let leaf = |function| {
        let entry = supported.iter().find(|entry| entry.function == function && entry.index == 0);
        entry.copied().unwrap_or_default()
    };
    let (features, extended, states) = (leaf(1).ecx, leaf(7).ebx, u64::from(leaf(0xd).eax));
    let has = |bits: u32, xcr0: u64| {
        features & (XSAVE | AVX) == XSAVE | AVX && extended & bits == bits && states & xcr0 == xcr0
    };
    let mut offered = vec![(Vectors::Avx512, AVX512F | AVX2, WITH_AVX512), (Vectors::Avx2, AVX2, WITH_AVX)];
    offered.retain(|(_, bits, xcr0)| has(*bits, *xcr0));
    offered.into_iter().map(|(vectors, _, xcr0)| (vectors, xcr0)).collect()
}

/// XCR0 and no other.
fn only(value: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..Default::default() };
    xcrs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(features: u32, extended: u32, states: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        vec![
            kvm_cpuid_entry2 { ecx: features, ..leaf(1) },
            kvm_cpuid_entry2 { ebx: extended, ..leaf(7) },
            kvm_cpuid_entry2 { eax: states, ..leaf(0xd) },
        ]
    }

    #[test]
    fn registers_are_used_where_they_can_be_switched_on() {
        let found = |features, extended, states| {
            let offered = offered(&processor(features, extended, states));
            offered.into_iter().map(|(vectors, _)| vectors).collect::<Vec<_>>()
        };
        assert_eq!(found(XSAVE | AVX, AVX2 | AVX512F, 0xff), [Vectors::Avx512, Vectors::Avx2]);
        assert_eq!(found(XSAVE | AVX, AVX2 | AVX512F, 0x7), [Vectors::Avx2]);
        assert_eq!(found(XSAVE | AVX, AVX512F, 0xff), []);
        assert_eq!(found(AVX, AVX2, 0x7), []);
        assert_eq!(offered(&[]), []);
    }
}
