//! What interrupts ring 3.
//!
//! In: a timer interrupt, a privileged instruction, another exception. Out: a tick counted; the instruction done for
//! ring 3; `FAIL exception …` and status 1. Holds: a handler changes no register but those the instruction answers in, and
//! needs no SSE.
//!
//! There is no system call: some hosts' KVM cannot take `int n` or `syscall` to ring 0, but all take #GP there.

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::ptr;

/// Gates in the IDT.
pub const VECTORS: usize = 64;
/// The local timer's vector.
pub const TIMER: u8 = 32;
const GENERAL_PROTECTION: u8 = 13;
/// Where the local APIC sends interrupts that went away: no end-of-interrupt.
pub const SPURIOUS: u8 = 63;
/// Vectors that push an error code (SDM volume 3, 6.13).
const HAS_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 3 << 29;
const APIC_EOI: u32 = 0xfee0_00b0;
const TSC_DEADLINE: u32 = 0x6e0;
const HLT: u8 = 0xf4;
const IN_BYTE: u8 = 0xec;
const OUT_BYTE: u8 = 0xee;
const WRMSR: u16 = u16::from_le_bytes([0x0f, 0x30]);
const RDMSR: u16 = u16::from_le_bytes([0x0f, 0x32]);

/// What a CPU's handlers share with its ring 3.
#[repr(C)]
pub struct Cpu {
    /// Timer interrupts so far.
    ticks: u64,
    /// If not zero, each timer interrupt arms the TSC deadline this many cycles ahead.
    deadline: u64,
}

global_asm!(
    ".pushsection .text.rt_trap, \"ax\"",
    ".globl rt_stubs",
    ".balign 16",
    "rt_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    ".balign 16",
    ".if vector == {timer}",
    "jmp rt_timer",
    ".elseif vector == {general_protection}",
    "jmp rt_general_protection",
    ".elseif vector == {spurious}",
    "iretq",
    ".else",
    ".if vector > 31 || !(({has_error_code} >> vector) & 1)",
    "push 0",
    ".endif",
    "push vector",
    "jmp rt_exception",
    ".endif",
    ".set vector, vector + 1",
    ".endr",
    "rt_timer:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "mov rbx, rsp",
    "and rbx, -4096",
    "inc qword ptr [rbx + {ticks}]",
    "cmp qword ptr [rbx + {deadline}], 0",
    "je 2f",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, [rbx + {deadline}]",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, {tsc_deadline}",
    "wrmsr",
    "2: mov eax, {eoi}",
    "mov dword ptr [rax], 0",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "iretq",
    // From ring 3, HLT, WRMSR and RDMSR are executed here, and IN and OUT of a byte where the processor does not honour the
    // TSS's I/O bitmap (QEMU's, for a guest of SVM). RBX: the instruction's address.
    "rt_general_protection:",
    "push rbx",
    "mov rbx, [rsp + 16]",
    "test byte ptr [rsp + 24], 3",
    "jz 6f",
    "cmp byte ptr [rbx], {hlt}",
    "je 3f",
    "cmp byte ptr [rbx], {in_byte}",
    "je 7f",
    "cmp byte ptr [rbx], {out_byte}",
    "je 8f",
    "cmp word ptr [rbx], {wrmsr}",
    "je 4f",
    "cmp word ptr [rbx], {rdmsr}",
    "jne 6f",
    "rdmsr",
    "jmp 5f",
    "3: sti",
    "hlt",
    "cli",
    "dec qword ptr [rsp + 16]",
    "jmp 5f",
    "4: wrmsr",
    "5: add qword ptr [rsp + 16], 2",
    "pop rbx",
    "add rsp, 8",
    "iretq",
    "7: in al, dx",
    "jmp 9f",
    "8: out dx, al",
    "9: dec qword ptr [rsp + 16]",
    "jmp 5b",
    "6: pop rbx",
    "push {general_protection}",
    // The frame is changed so that ring 3 goes on in the report, on its own stack.
    "rt_exception:",
    "pop rdi",
    "pop rsi",
    "mov rdx, [rsp]",
    "mov rcx, cr2",
    "mov qword ptr [rsp], offset {report}",
    "mov qword ptr [rsp + 8], {user_code}",
    "mov qword ptr [rsp + 16], 0x3002",
    "mov rax, [rsp + 24]",
    "sub rax, 256",
    "and rax, -16",
    "sub rax, 8",
    "mov [rsp + 24], rax",
    "mov qword ptr [rsp + 32], {user_data}",
    "iretq",
    ".popsection",
    vectors = const VECTORS,
    timer = const TIMER,
    general_protection = const GENERAL_PROTECTION,
    hlt = const HLT,
    in_byte = const IN_BYTE,
    out_byte = const OUT_BYTE,
    wrmsr = const WRMSR,
    rdmsr = const RDMSR,
    spurious = const SPURIOUS,
    has_error_code = const HAS_ERROR_CODE,
    ticks = const offset_of!(Cpu, ticks),
    deadline = const offset_of!(Cpu, deadline),
    tsc_deadline = const TSC_DEADLINE,
    eoi = const APIC_EOI,
    report = sym report,
    user_code = const super::entry::USER_CODE,
    user_data = const super::entry::USER_DATA,
);

extern "C" fn report(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    crate::fail!("exception vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}")
}

/// Reads a model-specific register.
pub fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: traps, and ring 0 does it; a register that isn't there ends the VM.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high) }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub fn write_msr(msr: u32, value: u64) {
    // SAFETY: as above; the guests write only MSRs of timers and clocks.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) }
}

/// Waits for an interrupt.
pub fn halt() {
    // SAFETY: traps, and ring 0 does it with interrupts on.
    unsafe { asm!("hlt") }
}

fn cpu(index: u32) -> *mut Cpu {
    unsafe extern "C" {
        static mut rt_cpus: [[u8; 4096]; super::entry::MAX_CPUS];
    }
    // SAFETY: an address within the array; `index` is a CPU's number, which is less than its length.
    unsafe { (&raw mut rt_cpus[index as usize]).cast() }
}

/// Timer interrupts that CPU `index` has had.
pub fn ticks(index: u32) -> u64 {
    // SAFETY: an aligned word that only the CPU's own handler writes, whole.
    unsafe { ptr::read_volatile(&raw const (*cpu(index)).ticks) }
}

/// Has each timer interrupt on CPU `index` arm the next one `cycles` later; 0 ends that.
pub fn set_deadline(index: u32, cycles: u64) {
    // SAFETY: as above; the handler only reads it.
    unsafe { ptr::write_volatile(&raw mut (*cpu(index)).deadline, cycles) }
}

/// Takes the IDT away and needs it.
pub fn triple_fault() -> ! {
    unsafe extern "C" {
        static mut rt_idt: [[u64; 2]; VECTORS];
    }
    // SAFETY: after this no interrupt returns, and none is meant to.
    unsafe {
        ptr::write_volatile(&raw mut rt_idt, [[0; 2]; VECTORS]);
        asm!("ud2", options(noreturn))
    }
}
