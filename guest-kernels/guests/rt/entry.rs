//! From the machine's hands to [`rt_main`](super::rt_main) in ring 3.
//!
//! In: a CPU at the PVH entry, at the 64-bit Linux entry, or at a start-up IPI. Out: long mode, SSE and all of
//! AVX that XCR0 can have, memory below 4 GiB mapped one to one and open to ring 3 as are the ports below
//! 0x800, interrupts on. Holds:
//! ring 0 is assembly of simple instructions, because on some hosts KVM's emulator runs it one by one.
//!
//! Each CPU has a page: [`Cpu`](super::trap::Cpu) at its start, the ring 0 stack at its end.

use core::arch::global_asm;

/// CPUs that there is room for.
pub const MAX_CPUS: usize = 16;
/// Where the trampoline for the other CPUs is copied: the only free page below the command line.
pub const TRAMPOLINE: usize = 0x8000;
/// Bytes of stack in ring 3.
const STACK: usize = 32 << 10;

/// How the machine was entered, as [`rt_main`](super::rt_main) is told: by PVH, with the start info.
pub const ENTERED_BY_PVH: u32 = 0;
/// By the 64-bit Linux protocol, with the zero page.
const ENTERED_BY_LINUX64: u32 = 1;
/// By a start-up IPI from another CPU.
pub const ENTERED_BY_IPI: u32 = 2;

const CODE32: u16 = 0x08;
const CODE64: u16 = 0x10;
const DATA: u16 = 0x18;
/// Ring 3's data segment. Both selectors are those of Linux: KVM on some hosts knows no others.
pub const USER_DATA: u16 = 0x2b;
/// Ring 3's 64-bit code segment.
pub const USER_CODE: u16 = 0x33;
/// The first of [`MAX_CPUS`] TSS descriptors.
const TSS: u16 = 0x40;

const CR0: u32 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1; // PG NE ET MP PE
const CR4: u32 = 1 << 10 | 1 << 9 | 1 << 5; // OSXMMEXCPT OSFXSR PAE
const CR4_OSXSAVE: u32 = 1 << 18;
const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;
const CPUID_XSAVE: u32 = 1 << 26;
const XCR0_KNOWN: u32 = 0xe7; // x87, SSE, AVX, AVX-512
const RFLAGS_USER: u32 = 1 << 9 | 1 << 1; // IF
/// A TSS, an I/O bitmap that opens ports below 0x800 to ring 3, and the byte of ones that must follow it.
const TSS_SIZE: u32 = 104 + 0x800 / 8 + 1;
const VECTORS: u32 = super::trap::VECTORS as u32;

// PVH: the Xen note, and 32-bit code up to long mode, which the other CPUs share.
global_asm!(
    ".pushsection .note.pvh, \"a\", @note",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long rt_start32",
    ".popsection",
    ".pushsection .text.rt_entry, \"ax\"",
    ".code32",
    ".globl rt_start32",
    "rt_start32:",
    "mov edi, ebx",
    "mov esi, {by_pvh}",
    "lgdt [rt_gdt_pointer]",
    "jmp rt_paging",
    "rt_application32:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov ss, eax",
    "mov esi, {by_ipi}",
    "rt_paging:",
    "cld",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov eax, offset rt_pml4",
    "mov cr3, eax",
    "mov ecx, {efer}",
    "rdmsr",
    "or eax, {lme}",
    "wrmsr",
    "mov eax, {cr0}",
    "mov cr0, eax",
    ".byte 0xea", // ljmp
    ".long rt_long",
    ".word {code64}",
    // A start-up IPI: 16-bit code, copied to TRAMPOLINE; CS is that page.
    ".code16",
    ".globl rt_trampoline, rt_trampoline_end",
    "rt_trampoline:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16", // lgdt with a 32-bit base
    ".word 2f - rt_trampoline",
    "mov eax, 0x11", // PE ET
    "mov cr0, eax",
    ".byte 0x66, 0xea", // ljmp with a 32-bit offset
    ".long rt_application32",
    ".word {code32}",
    "2: .word {gdt_limit}",
    ".long rt_gdt",
    "rt_trampoline_end:",
    ".code64",
    ".popsection",
    by_pvh = const ENTERED_BY_PVH,
    by_ipi = const ENTERED_BY_IPI,
    data = const DATA,
    cr4 = const CR4,
    efer = const EFER,
    lme = const EFER_LME,
    cr0 = const CR0,
    code64 = const CODE64,
    code32 = const CODE32,
    gdt_limit = const TSS as usize + 16 * MAX_CPUS - 1,
);

// The 64-bit Linux entry, and what every CPU does in long mode.
global_asm!(
    ".pushsection .text.rt_entry, \"ax\"",
    ".globl rt_start64",
    "rt_start64:",
    "cld",
    "mov rdi, rsi",
    "mov esi, {by_linux64}",
    "lgdt [rt_gdt_pointer]",
    "mov eax, {cr4}",
    "mov cr4, rax",
    "mov eax, offset rt_pml4",
    "mov cr3, rax",
    "mov eax, {cr0}",
    "mov cr0, rax",
    "mov esp, offset rt_cpus + 4096",
    "push {code64}",
    "push offset rt_long",
    ".byte 0x48, 0xcb", // lretq
    "rt_long:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    // r8: the local APIC's id, which is the CPU's number. The CPU's page ends in its ring 0 stack.
    "mov eax, 1",
    "cpuid",
    "mov r10d, ecx",
    "mov r8d, ebx",
    "shr r8d, 24",
    "and r8d, {max_cpus} - 1",
    "mov esp, r8d",
    "shl esp, 12",
    "add esp, offset rt_cpus + 4096",
    // The TSS and its descriptor.
    "mov edx, r8d",
    "imul edx, edx, {tss_size}",
    "add edx, offset rt_tss",
    "mov [rdx + 4], rsp",
    "mov word ptr [rdx + 102], 104",
    "mov byte ptr [rdx + {tss_size} - 1], 0xff",
    "mov ecx, r8d",
    "shl ecx, 4",
    "mov eax, edx",
    "shl eax, 16",
    "or eax, {tss_size} - 1",
    "mov [rt_gdt + {tss} + rcx], eax",
    "mov eax, edx",
    "shr eax, 16",
    "and eax, 0xff",
    "and edx, 0xff000000",
    "or eax, edx",
    "or eax, 0x8900",
    "mov [rt_gdt + {tss} + 4 + rcx], eax",
    "add ecx, {tss}",
    "ltr cx",
    // The IDT: the boot CPU writes a gate for each stub.
    "cmp esi, {by_ipi}",
    "je 4f",
    "mov eax, offset rt_stubs",
    "mov edx, offset rt_idt",
    "mov ecx, {vectors}",
    "3: mov ebx, eax",
    "and ebx, 0xffff",
    "or ebx, {code64} << 16",
    "mov [rdx], ebx",
    "mov ebx, eax",
    "and ebx, 0xffff0000",
    "or ebx, 0x8e00",
    "mov [rdx + 4], ebx",
    "add eax, 16",
    "add edx, 16",
    "dec ecx",
    "jnz 3b",
    "4: lidt [rt_idt_pointer]",
    "test r10d, {cpuid_xsave}",
    "jz 5f",
    "mov rax, cr4",
    "or eax, {osxsave}",
    "mov cr4, rax",
    "mov eax, 0xd",
    "xor ecx, ecx",
    "cpuid",
    "and eax, {xcr0_known}",
    "xor edx, edx",
    "xor ecx, ecx",
    "xsetbv",
    // To ring 3.
    "5: mov edx, r8d",
    "mov eax, r8d",
    "inc eax",
    "imul eax, eax, {stack}",
    "add eax, offset rt_stacks - 8",
    "push {user_data}",
    "push rax",
    "push {rflags}",
    "push {user_code}",
    "push offset {main}",
    "iretq",
    ".popsection",
    by_linux64 = const ENTERED_BY_LINUX64,
    by_ipi = const ENTERED_BY_IPI,
    cr4 = const CR4,
    cr0 = const CR0,
    code64 = const CODE64,
    data = const DATA,
    max_cpus = const MAX_CPUS,
    tss = const TSS,
    tss_size = const TSS_SIZE,
    vectors = const VECTORS,
    cpuid_xsave = const CPUID_XSAVE,
    osxsave = const CR4_OSXSAVE,
    xcr0_known = const XCR0_KNOWN,
    stack = const STACK,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    rflags = const RFLAGS_USER,
    main = sym super::rt_main,
);

// Tables. The page directories map 2048 pages of 2 MiB, present, writable, open to ring 3.
global_asm!(
    ".pushsection .data.rt_tables, \"aw\"",
    ".balign 4096",
    "rt_pml4: .quad rt_pdpt + 7",
    ".balign 4096",
    "rt_pdpt: .quad rt_pd + 0x0007, rt_pd + 0x1007, rt_pd + 0x2007, rt_pd + 0x3007",
    ".balign 4096",
    "rt_pd:",
    ".set page, 0",
    ".rept 2048",
    ".quad page + 0x87",
    ".set page, page + 0x200000",
    ".endr",
    "rt_gdt: .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff",
    ".quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0",
    ".space 16 * {max_cpus}",
    "rt_gdt_pointer: .word . - rt_gdt - 1",
    ".quad rt_gdt",
    "rt_idt_pointer: .word 16 * {vectors} - 1",
    ".quad rt_idt",
    ".popsection",
    ".pushsection .bss.rt_tables, \"aw\", @nobits",
    ".globl rt_cpus, rt_idt",
    ".balign 4096",
    "rt_cpus: .space 4096 * {max_cpus}",
    "rt_stacks: .space {stack} * {max_cpus}",
    "rt_tss: .space {tss_size} * {max_cpus}",
    "rt_idt: .space 16 * {vectors}",
    ".popsection",
    max_cpus = const MAX_CPUS,
    vectors = const VECTORS,
    stack = const STACK,
    tss_size = const TSS_SIZE,
);
