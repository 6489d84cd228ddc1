//! What is tried on this host's KVM: one small question each.
//!
//! In: a KVM handle. Out: a [`Finding`] for each question. Holds: a VM in which something failed isn't used again.

use crate::cpuid;
use crate::fault::Fault;
use crate::kvm::{During, Ioctl};
use crate::layout::PAGE_SIZE;
use crate::probe::{Bench, DATA, End, LIMIT, ProbeError, Ring};
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::Kvm;
use std::time::Instant;

/// A question.
#[derive(Debug)]
pub(crate) struct Probe {
    /// What is tried.
    pub(crate) name: &'static str,
    /// What doesn't work where the answer is no.
    pub(crate) without: &'static str,
    /// Linux can't run without it.
    pub(crate) linux_needs_it: bool,
    ask: fn(&mut Examiner<'_>) -> Result<Finding, ProbeError>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    Works,
    /// The host's processor doesn't offer it, so guests don't use it.
    NotOffered,
    /// No, and why.
    Fails(String),
}

/// Asks questions, in one VM as long as all goes well.
pub(crate) struct Examiner<'a> {
    kvm: &'a Kvm,
    supported: Vec<kvm_cpuid_entry2>,
    bench: Option<Bench>,
}

impl<'a> Examiner<'a> {
    pub(crate) fn new(kvm: &'a Kvm) -> Result<Self, Ioctl> {
        Ok(Self { kvm, supported: cpuid::supported(kvm)?, bench: None })
    }

    pub(crate) fn ask(&mut self, probe: &Probe) -> Finding {
        let finding =
            (probe.ask)(self).unwrap_or_else(|e| Finding::Fails(format!("could not be tried: {e}")));
        if matches!(finding, Finding::Fails(_)) {
            self.bench = None;
        }
        finding
    }

    fn bench(&mut self) -> Result<&mut Bench, ProbeError> {
        match &mut self.bench {
            Some(bench) => Ok(bench),
            none => Ok(none.insert(Bench::new(self.kvm, &self.supported)?)),
        }
    }

    fn offers(&self, function: u32, bit: fn(&kvm_cpuid_entry2) -> u32) -> bool {
        self.supported.iter().any(|leaf| leaf.function == function && leaf.index == 0 && bit(leaf) & 1 == 1)
    }

    /// Millions of ring 0 instructions per second: the best of a few short runs, since the first ones fill caches and a
    /// busy host interrupts others.
    pub(crate) fn ring0_mips(&mut self) -> Result<f64, ProbeError> {
        const LOOPS: u64 = 5_000;
        let mut best = 0f64;
        for _ in 0..5 {
            let begun = Instant::now();
            let end = run(self, COUNT_DOWN, kvm_regs { rcx: LOOPS, ..Default::default() })?;
            if matches!(end, End::Reached(_)) {
                best = best.max(2.0 * LOOPS as f64 / begun.elapsed().as_secs_f64() / 1e6);
            }
        }
        Ok(best)
    }
}

const NO_BOOT: &str = "Linux guests do not boot";
const NO_FIDELITY: &str = "restored guests differ";

const NO_LOG: &str = "no --track";

/// Every question. Those that decide about Linux come first.
pub(crate) const PROBES: [Probe; 11] = [
    Probe { name: "lock cmpxchg16b in ring 0", without: NO_BOOT, linux_needs_it: true, ask: cmpxchg16b },
    Probe { name: "popcnt in ring 0", without: NO_BOOT, linux_needs_it: true, ask: popcnt },
    Probe { name: "int3 in ring 0", without: NO_BOOT, linux_needs_it: true, ask: int3 },
    Probe { name: "clac in ring 0", without: NO_BOOT, linux_needs_it: true, ask: clac },
    Probe { name: "xsave64, xrstor64 in ring 0", without: NO_BOOT, linux_needs_it: true, ask: xrstor },
    Probe { name: "syscall reaches ring 0", without: NO_BOOT, linux_needs_it: true, ask: syscall },
    Probe { name: "XSAVE state holds", without: NO_FIDELITY, linux_needs_it: false, ask: xsave_state },
    Probe { name: "CPUID leaf can be added", without: NO_FIDELITY, linux_needs_it: false, ask: cpuid_leaf },
    Probe { name: "CPUID bit can be hidden", without: NO_FIDELITY, linux_needs_it: false, ask: cpuid_bit },
    Probe { name: "TSC can be set", without: NO_FIDELITY, linux_needs_it: false, ask: tsc },
    Probe { name: "dirty log has every write", without: NO_LOG, linux_needs_it: false, ask: dirty_log },
];

/// An instruction, and how a disassembler writes it.
type Line = (&'static [u8], &'static str);

const END: Line = (&[0xe6, 0xf4], "out 0F4h,al");
const CMPXCHG16B: &[Line] =
    &[(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], "lock cmpxchg16b [rdi]"), (&[0x0f, 0x94, 0xc0], "sete al"), END];
const POPCNT: &[Line] = &[(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7], "popcnt rax,rdi"), END];
const INT3: &[Line] = &[(&[0xcc], "int3")];
const CLAC: &[Line] = &[(&[0x0f, 0x01, 0xca], "clac"), (&[0xb0, 0x33], "mov al,33h"), END];
const XRSTOR: &[Line] = &[
    (&[0x0f, 0x20, 0xe2], "mov rdx,cr4"),
    (&[0x0f, 0xba, 0xea, 0x12], "bts edx,12h"),
    (&[0x0f, 0x22, 0xe2], "mov cr4,rdx"),
    (&[0x31, 0xd2], "xor edx,edx"),
    (&[0x48, 0x0f, 0xae, 0x27], "xsave64 [rdi]"),
    (&[0x48, 0x0f, 0xae, 0x2f], "xrstor64 [rdi]"),
    END,
];
/// From ring 0 to ring 3, where it stays a while, and back.
const SYSCALL: &[Line] = &[
    (&[0x6a, 0x23], "push 23h"),
    (&[0x54], "push rsp"),
    (&[0x6a, 0x02], "push 2"),
    (&[0x6a, 0x2b], "push 2Bh"),
    (&[0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00], "lea rax,[11h]"),
    (&[0x50], "push rax"),
    (&[0x48, 0xcf], "iretq"),
    (&[0x48, 0xff, 0xc9], "dec rcx"),
    (&[0x75, 0xfb], "jne short 0000000000000011h"),
    (&[0x0f, 0x05], "syscall"),
];
const ARRIVED: &[Line] = &[(&[0xb0, 0x33], "mov al,33h"), END];
const SWAP_XMM: &[Line] = &[
    (&[0x66, 0x48, 0x0f, 0x7e, 0xc0], "movq rax,xmm0"),
    (&[0x66, 0x48, 0x0f, 0x6e, 0xcf], "movq xmm1,rdi"),
    END,
];
const CPUID: &[Line] = &[(&[0x0f, 0xa2], "cpuid"), END];
const RDTSC: &[Line] = &[(&[0x0f, 0x31], "rdtsc"), END];
const STORE: &[Line] = &[(&[0x48, 0x89, 0x07], "mov [rdi],rax"), END];
const COUNT_DOWN: &[Line] = &[(&[0x48, 0xff, 0xc9], "dec rcx"), (&[0x75, 0xfb], "jne short 0"), END];

/// What a handler, or code that has nothing to compute, leaves in AL.
const HERE: u64 = 0x33;

fn code(lines: &[Line]) -> Vec<u8> {
    lines.iter().flat_map(|(bytes, _)| bytes.iter().copied()).collect()
}

/// What an end says about code that should have left `wanted` in the byte AL.
fn expect(end: End, wanted: u64) -> Finding {
    judge(end, |regs| match regs.rax & 0xff {
        value if value == wanted => Finding::Works,
        value => Finding::Fails(format!("the guest got {value:#x}, not {wanted:#x}")),
    })
}

fn judge(end: End, reached: impl FnOnce(&kvm_regs) -> Finding) -> Finding {
    match end {
        End::Reached(regs) => reached(&regs),
        End::Fault(Fault::Internal { suberror: 1, .. }) => Finding::Fails("KVM cannot emulate it".into()),
        End::Fault(Fault::Shutdown) => Finding::Fails("the guest got an exception instead".into()),
        End::Fault(fault) => Finding::Fails(fault.to_string()),
        End::TimedOut => Finding::Fails(format!("not done after {} ms", LIMIT.as_millis())),
    }
}

fn run(with: &mut Examiner<'_>, lines: &[Line], regs: kvm_regs) -> Result<End, ProbeError> {
    with.bench()?.run(&code(lines), regs, Ring::Kernel)
}

/// Runs code as a guest's programs run, natively where ring 0 isn't.
fn run_as_user(bench: &mut Bench, lines: &[Line], regs: kvm_regs) -> Result<End, ProbeError> {
    const IOPL_3: u64 = 3 << 12;
    bench.run(&code(lines), kvm_regs { rflags: IOPL_3, ..regs }, Ring::User)
}

fn run_with_handler(with: &mut Examiner<'_>, lines: &[Line]) -> Result<Finding, ProbeError> {
    let bench = with.bench()?;
    bench.set_handler(&code(ARRIVED))?;
    Ok(expect(bench.run(&code(lines), kvm_regs { rcx: 10_000, ..Default::default() }, Ring::Kernel)?, HERE))
}

/// Compares 16 zero bytes with zero, which is equal.
fn cmpxchg16b(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    Ok(expect(run(with, CMPXCHG16B, kvm_regs { rdi: DATA, rbx: 1, ..Default::default() })?, 1))
}

fn popcnt(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    Ok(expect(run(with, POPCNT, kvm_regs { rdi: 0xff00_00ff, ..Default::default() })?, 16))
}

fn int3(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    run_with_handler(with, INT3)
}

fn syscall(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    run_with_handler(with, SYSCALL)
}

/// SMAP is leaf 7, EBX bit 20 (Intel SDM 2, CPUID).
fn clac(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    if !with.offers(7, |leaf| leaf.ebx >> 20) {
        return Ok(Finding::NotOffered);
    }
    Ok(expect(run(with, CLAC, kvm_regs::default())?, HERE))
}

/// Saves and loads the x87 state (mask 1). XSAVE is leaf 1, ECX bit 26.
fn xrstor(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    if !with.offers(1, |leaf| leaf.ecx >> 26) {
        return Ok(Finding::NotOffered);
    }
    Ok(expect(run(with, XRSTOR, kvm_regs { rdi: DATA, rax: 1, ..Default::default() })?, 1))
}

/// Sets XMM0 from outside and reads XMM1 from outside; the guest does the reverse. Offsets are the SDM's (1, 10.5.1),
/// XSTATE_BV in the header at 512 (1, 13.4.2), all in 32-bit words.
fn xsave_state(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    let (xmm0, xmm1, xstate_bv) = (160 / 4, 176 / 4, 512 / 4);
    let bench = with.bench()?;
    let mut xsave = bench.vcpu.get_xsave().during("KVM_GET_XSAVE")?;
    (xsave.region[xmm0], xsave.region[xmm0 + 1]) = (0x1122_3344, 0x5566_7788);
    xsave.region[xstate_bv] |= 3;
    // SAFETY: KVM reads more than the 4 KiB of a kvm_xsave only where the process has asked for AMX, and this one hasn't.
    unsafe { bench.vcpu.set_xsave(&xsave) }.during("KVM_SET_XSAVE")?;
    let end = run_as_user(bench, SWAP_XMM, kvm_regs { rdi: 0x99aa_bbcc, ..Default::default() })?;
    let after = bench.vcpu.get_xsave().during("KVM_GET_XSAVE")?.region[xmm1];
    Ok(judge(end, |regs| match (regs.rax, after) {
        (0x5566_7788_1122_3344, 0x99aa_bbcc) => Finding::Works,
        (_, 0x99aa_bbcc) => Finding::Fails("what is set does not reach the guest".into()),
        _ => Finding::Fails("what the guest has cannot be read".into()),
    }))
}

fn cpuid_leaf(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    let function = 0x4000_0100;
    let added = kvm_cpuid_entry2 {
        function,
        eax: 0x1122,
        ebx: 0x3344,
        ecx: 0x5566,
        edx: 0x7788,
        ..Default::default()
    };
    let mut entries = with.supported.clone();
    entries.push(added);
    let end = ask_cpuid(with.kvm, &entries, function)?;
    Ok(judge(end, |regs| match [regs.rax, regs.rbx, regs.rcx, regs.rdx] {
        [0x1122, 0x3344, 0x5566, 0x7788] => Finding::Works,
        _ => Finding::Fails("the guest does not see it".into()),
    }))
}

/// Hides XSAVE (leaf 1, ECX bit 26), and the bits that mean nothing without it.
fn cpuid_bit(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    let xsave = 1 << 26;
    let mut entries = with.supported.clone();
    let (osxsave, avx) = (1 << 27, 1 << 28);
    entries
        .iter_mut()
        .filter(|leaf| leaf.function == 1)
        .for_each(|leaf| leaf.ecx &= !(xsave | osxsave | avx));
    entries.retain(|leaf| leaf.function != 0xd);
    let end = ask_cpuid(with.kvm, &entries, 1)?;
    Ok(judge(end, |regs| match regs.rcx & xsave as u64 {
        0 => Finding::Works,
        _ => Finding::Fails("the guest sees XSAVE, which was hidden".into()),
    }))
}

fn ask_cpuid(kvm: &Kvm, entries: &[kvm_cpuid_entry2], function: u32) -> Result<End, ProbeError> {
    let regs = kvm_regs { rax: u64::from(function), ..Default::default() };
    run_as_user(&mut Bench::new(kvm, entries)?, CPUID, regs)
}

/// Sets the TSC far ahead; the guest must read a little more. A minute's worth of ticks at 4 GHz is plenty.
fn tsc(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    const IA32_TSC: u32 = 0x10;
    let (set, plenty) = (1 << 60, 60 * 4_000_000_000);
    let bench = with.bench()?;
    bench.set_msrs(&[(IA32_TSC, set)])?;
    let end = run_as_user(bench, RDTSC, kvm_regs::default())?;
    Ok(judge(end, |regs| {
        let read = regs.rdx << 32 | regs.rax & 0xffff_ffff;
        if (set..set + plenty).contains(&read) {
            Finding::Works
        } else {
            Finding::Fails("what is set does not reach the guest".into())
        }
    }))
}

/// Writes from both rings, the second time when the first was told.
fn dirty_log(with: &mut Examiner<'_>) -> Result<Finding, ProbeError> {
    let page = DATA / PAGE_SIZE;
    let bench = with.bench()?;
    let log = bench.log()?;
    let mut finding = Finding::Works;
    for (round, ring) in [(1, "ring 0"), (2, "ring 3"), (3, "ring 0"), (4, "ring 3")] {
        let regs = kvm_regs { rax: round, rdi: DATA, ..Default::default() };
        let end = match ring {
            "ring 0" => bench.run(&code(STORE), regs, Ring::Kernel)?,
            _ => run_as_user(bench, STORE, regs)?,
        };
        let logged = log.take()?.contains(page);
        finding = judge(end, |_| match logged {
            true => finding,
            false => Finding::Fails(format!("a write in {ring} is not in it")),
        });
    }
    log.stop();
    Ok(finding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    #[test]
    fn the_machine_code_is_what_it_says() {
        for lines in [
            CMPXCHG16B, POPCNT, INT3, CLAC, XRSTOR, SYSCALL, ARRIVED, SWAP_XMM, CPUID, RDTSC, STORE,
            COUNT_DOWN,
        ] {
            let bytes = code(lines);
            let decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
            let decoded: Vec<String> = decoder.into_iter().map(|instruction| text(&instruction)).collect();
            let written: Vec<&str> = lines.iter().map(|(_, text)| *text).collect();
            assert_eq!(decoded, written);
        }
    }

    fn text(instruction: &iced_x86::Instruction) -> String {
        let mut text = String::new();
        IntelFormatter::new().format(instruction, &mut text);
        text
    }
}
