//! What to say when KVM can't go on: where the vCPU is, in which mode, and at which instruction.
//!
//! In: the fields of `kvm_run`, the registers, a reader of guest memory. Out: one line of text. Holds: whatever a guest
//! left in its registers and memory, this ends soon and says something.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SHUTDOWN, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as HAS_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_regs, kvm_run, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use std::fmt::{self, Write};

/// The longest x86 instruction, in bytes (Intel SDM 2, 2.3.11).
const INSTRUCTION_MAX: usize = 15;
const PAGE_SIZE: u64 = 4096;

/// An exit after which the vCPU can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `KVM_EXIT_INTERNAL_ERROR`
    Internal {
        /// Which kind: `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// What KVM adds to it.
        data: Vec<u64>,
    },
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused to enter the guest.
    EntryFailed {
        /// The processor's reason.
        reason: u64,
    },
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// An exit that isn't expected of the guests run here.
    Unexpected {
        /// `KVM_EXIT_*`
        exit_reason: u32,
    },
}

impl Fault {
    /// What the last exit says.
    pub fn of(run: &kvm_run) -> Self {
        match run.exit_reason {
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: this exit reason says that `internal` is the field that KVM filled in.
                let internal = unsafe { run.__bindgen_anon_1.internal };
                let count = (internal.ndata as usize).min(internal.data.len());
                Self::Internal { suberror: internal.suberror, data: internal.data[..count].to_vec() }
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: this exit reason says that `fail_entry` is the field that KVM filled in.
                let reason = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                Self::EntryFailed { reason }
            }
            KVM_EXIT_SHUTDOWN => Self::Shutdown,
            exit_reason => Self::Unexpected { exit_reason },
        }
    }

    /// The bytes at RIP, where KVM gives them: a flag word, then a length byte and up to 15 bytes.
    fn instruction_bytes(&self) -> Option<Vec<u8>> {
        let Self::Internal { suberror: KVM_INTERNAL_ERROR_EMULATION, data } = self else { return None };
        let [flags, first, second, ..] = data[..] else { return None };
        if flags & u64::from(HAS_BYTES) == 0 {
            return None;
        }
        let [size, bytes @ ..] = u128_bytes(first, second);
        Some(bytes[..usize::from(size).min(INSTRUCTION_MAX)].to_vec())
    }
}

fn u128_bytes(low: u64, high: u64) -> [u8; 16] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}

/// Says all about the exit that `vcpu` has just had. `read_physical` fills a buffer that lies within one page from guest
/// physical memory, or says that it can't.
pub fn report(vcpu: &mut VcpuFd, mut read_physical: impl FnMut(u64, &mut [u8]) -> bool) -> String {
    let fault = Fault::of(vcpu.get_kvm_run());
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return fault.to_string();
    };
    describe(&fault, &regs, &sregs, &mut |address, buffer| {
        read_linear(address, buffer, &mut |page| translate(vcpu, page), &mut read_physical)
    })
}

fn translate(vcpu: &VcpuFd, address: u64) -> Option<u64> {
    vcpu.translate_gva(address).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
}

/// Fills `buffer` from a linear address, page by page; returns how much of it could be read.
fn read_linear(
    address: u64,
    buffer: &mut [u8],
    translate: &mut dyn FnMut(u64) -> Option<u64>,
    read_physical: &mut dyn FnMut(u64, &mut [u8]) -> bool,
) -> usize {
    let mut done = 0;
    while done < buffer.len() {
        let from = address.wrapping_add(done as u64);
        let in_page = (PAGE_SIZE - from % PAGE_SIZE).min((buffer.len() - done) as u64) as usize;
        let read = translate(from).is_some_and(|gpa| read_physical(gpa, &mut buffer[done..done + in_page]));
        if !read {
            break;
        }
        done += in_page;
    }
    done
}

/// The line for a fault. `read_linear` fills a buffer from guest linear memory and returns how much it could read.
pub fn describe(
    fault: &Fault,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    read_linear: &mut dyn FnMut(u64, &mut [u8]) -> usize,
) -> String {
    let mut text = fault.to_string();
    if *fault == Fault::Shutdown && was_reset(regs, sregs) {
        text.push_str("; KVM has reset the vCPU, so where it happened is not known");
        return text;
    }
    let mode = Mode::of(regs, sregs);
    let bytes = fault.instruction_bytes().filter(|b| !b.is_empty()).unwrap_or_else(|| {
        let mut buffer = [0; INSTRUCTION_MAX];
        let count = read_linear(mode.linear(regs, sregs), &mut buffer);
        buffer[..count.min(INSTRUCTION_MAX)].to_vec()
    });
    let _ =
        write!(text, ": RIP {:#x}, {}, {}", regs.rip, mode.text(sregs), instruction(&bytes, &mode, regs.rip));
    text
}

/// Where vCPU `index` stands, for a person with the guest kernel's symbols: a triple fault is told of one vCPU, and may
/// have its cause on another.
pub fn place(index: usize, regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    if was_reset(regs, sregs) {
        return format!(
            "vCPU {index}: as after a reset; if it had started, KVM has reset it, and where it was is not known"
        );
    }
    let mode = Mode::of(regs, sregs).text(sregs);
    let (rip, rsp, kvm_sregs { cr2, cr3, gdt, idt, .. }) = (regs.rip, regs.rsp, sregs);
    format!(
        "vCPU {index}: RIP {rip:#x}, {mode}; RSP {rsp:#x}, CR2 {cr2:#x}, CR3 {cr3:#x}, GDT {:#x}+{:#x}, IDT {:#x}+{:#x}",
        gdt.base, gdt.limit, idt.base, idt.limit
    )
}

/// AMD leaves the state undefined after a shutdown, and KVM puts the vCPU in its reset state.
fn was_reset(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    regs.rip == 0xfff0 && sregs.cs.base == 0xffff_0000
}

/// What happened, without the place.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Internal { suberror, data } => f.write_str(&internal_cause(*suberror, data)),
            Self::EntryFailed { reason } => {
                let meaning = entry_failure(*reason);
                write!(
                    f,
                    "the processor would not enter the guest (KVM_EXIT_FAIL_ENTRY, reason {reason:#x}{meaning})"
                )
            }
            Self::Shutdown => f.write_str("the guest's processor has shut down after a triple fault"),
            Self::Unexpected { exit_reason } => {
                write!(f, "KVM stopped the guest for an unexpected reason, {exit_reason}")
            }
        }
    }
}

/// Intel's VM-instruction error numbers and exit reasons are from the SDM, 3C 30.4 and appendix C; AMD's VMEXIT_INVALID
/// is from the APM, 2 15.5.1.
fn entry_failure(reason: u64) -> &'static str {
    match reason {
        7 => " (Intel: invalid control fields)",
        8 => " (Intel: invalid host state)",
        0x8000_0021 => " (Intel: invalid guest state)",
        0x8000_0022 => " (Intel: MSR loading failed)",
        u64::MAX | 0xffff_ffff => " (AMD: invalid guest state)",
        _ => "",
    }
}

fn internal_cause(suberror: u32, data: &[u64]) -> String {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            return "this host's KVM cannot emulate a guest instruction (KVM_EXIT_INTERNAL_ERROR, suberror 1)".into();
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came together",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for a reason KVM does not know"
        }
        _ => "KVM failed in a way unknown here",
    };
    let data: Vec<String> = data.iter().map(|word| format!("{word:#x}")).collect();
    format!("{what} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}, data [{}])", data.join(" "))
}

/// How the processor reads instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Virtual8086,
    /// 16 or 32
    Protected(u32),
    /// Long mode running 16- or 32-bit code
    Compatibility(u32),
    Long,
}

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_VM: u64 = 1 << 17;

impl Mode {
    fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let code_bits = if sregs.cs.db != 0 { 32 } else { 16 };
        let long = sregs.efer & EFER_LMA != 0;
        match () {
            () if sregs.cr0 & CR0_PE == 0 => Self::Real,
            () if long && sregs.cs.l != 0 => Self::Long,
            () if long => Self::Compatibility(code_bits),
            () if regs.rflags & RFLAGS_VM != 0 => Self::Virtual8086,
            () => Self::Protected(code_bits),
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Virtual8086 => 16,
            Self::Protected(bits) | Self::Compatibility(bits) => bits,
            Self::Long => 64,
        }
    }

    /// Linear address of the next instruction. In 64-bit code the segment's base counts for nothing.
    fn linear(self, regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
        match self {
            Self::Long => regs.rip,
            _ => sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff,
        }
    }

    fn text(self, sregs: &kvm_sregs) -> String {
        let paging = if sregs.cr0 & CR0_PG != 0 { "paging on" } else { "paging off" };
        // KVM keeps the current privilege level in SS.
        let level = sregs.ss.dpl & 3;
        match self {
            Self::Real => "real mode".into(),
            Self::Virtual8086 => format!("virtual-8086 mode, CPL 3, {paging}"),
            Self::Protected(bits) => format!("protected mode ({bits}-bit), CPL {level}, {paging}"),
            Self::Compatibility(bits) => format!("long mode ({bits}-bit code), CPL {level}, {paging}"),
            Self::Long => format!("long mode, CPL {level}, {paging}"),
        }
    }
}

/// "`mnemonic operands` (its bytes)".
fn instruction(bytes: &[u8], mode: &Mode, rip: u64) -> String {
    if bytes.is_empty() {
        return "where no guest memory can be read".into();
    }
    let decoded = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE).decode();
    if decoded.is_invalid() {
        return format!("no known instruction ({})", hex(bytes));
    }
    let mut text = String::new();
    IntelFormatter::new().format(&decoded, &mut text);
    format!("`{text}` ({})", hex(&bytes[..decoded.len()]))
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

#[cfg(test)]
mod tests;
