//! `vmm-exit N`, a program for Linux guests that ends the VM with status N.
//!
//! In: nothing. Out: a whole static ELF executable of a few hundred bytes. Holds: it needs no library and no device node
//! (Debian's kernels have no /dev/port): `ioperm`, then one byte to the exit port.
//!
//! It is written out here, headers included, so that an initramfs can be made from this library alone.
//! Sources: System V ABI, chapters 4 and 5, and its AMD64 supplement, 3.4.1 "Initial Stack"; `ioperm(2)`.

use std::arch::global_asm;

/// The I/O port that ends the VM; the byte written is the status.
pub const EXIT_PORT: u16 = 0xf4;
/// Where the program is mapped.
const BASE: u64 = 0x40_0000;
const SYS_WRITE: u32 = 1;
const SYS_EXIT: u32 = 60;
const SYS_IOPERM: u32 = 173;

global_asm!(
    ".pushsection .rodata.vmm_exit, \"a\", @progbits",
    // Global, because the code that names them may end up in another object file; hidden, because nobody else needs them.
    ".globl vmm_exit_image, vmm_exit_end",
    ".hidden vmm_exit_image, vmm_exit_end",
    "vmm_exit_image:",
    // ELF header: 64-bit, little-endian, ET_EXEC, x86-64, one program header right behind.
    ".byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0",
    ".quad 0",
    ".short 2, 62",
    ".long 1",
    ".quad {base} + (30f - vmm_exit_image), 64, 0",
    ".long 0",
    ".short 64, 56, 1, 64, 0, 0",
    // Program header: PT_LOAD, readable and executable, the whole file.
    ".long 1, 5",
    ".quad 0, {base}, {base}",
    ".quad vmm_exit_end - vmm_exit_image, vmm_exit_end - vmm_exit_image, 0x1000",
    // On entry: argc at rsp, argv[1] at rsp + 16. The number grows in ebx.
    "30: cmp qword ptr [rsp], 2",
    "jne 60f",
    "mov rsi, [rsp + 16]",
    "xor ebx, ebx",
    "cmp byte ptr [rsi], 0",
    "je 60f",
    "31: movzx eax, byte ptr [rsi]",
    "inc rsi",
    "test eax, eax",
    "jz 40f",
    "sub eax, '0'",
    "cmp eax, 9",
    "ja 60f",
    "imul ebx, ebx, 10",
    "add ebx, eax",
    "cmp ebx, 255",
    "ja 60f",
    "jmp 31b",
    // ioperm(port, 1, 1), and out.
    "40: mov edi, {port}",
    "mov esi, 1",
    "mov edx, 1",
    "mov eax, {ioperm}",
    "syscall",
    "test eax, eax",
    "jnz 50f",
    "mov edx, {port}",
    "mov eax, ebx",
    "out dx, al",
    "lea rsi, [rip + 70f]",
    "jmp 61f",
    "50: lea rsi, [rip + 71f]",
    "jmp 61f",
    "60: lea rsi, [rip + 72f]",
    // Only reached when the VM goes on: say why on stderr, exit with 1. A message begins with its length.
    "61: movzx edx, byte ptr [rsi]",
    "inc rsi",
    "mov edi, 2",
    "mov eax, {write}",
    "syscall",
    "mov edi, 1",
    "mov eax, {exit}",
    "syscall",
    "70: .byte 71f - 70b - 1",
    ".ascii \"vmm-exit: this machine has no exit port at 0xf4\\n\"",
    "71: .byte 72f - 71b - 1",
    ".ascii \"vmm-exit: ioperm refused: root is needed\\n\"",
    "72: .byte vmm_exit_end - 72b - 1",
    ".ascii \"usage: vmm-exit STATUS (0 to 255)\\n\"",
    "vmm_exit_end:",
    ".popsection",
    base = const BASE,
    port = const EXIT_PORT,
    ioperm = const SYS_IOPERM,
    write = const SYS_WRITE,
    exit = const SYS_EXIT,
);

unsafe extern "C" {
    static vmm_exit_image: u8;
    static vmm_exit_end: u8;
}

/// The executable's bytes.
pub fn vmm_exit() -> &'static [u8] {
    let (start, end) = (&raw const vmm_exit_image, &raw const vmm_exit_end);
    // SAFETY: both symbols are defined above in one section, the second behind the first, and what lies between them
    // are initialised bytes that nothing writes.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Output};

    /// Runs it on this machine, which must not reach the `out` instruction.
    fn run(arguments: &[&str]) -> Output {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm-exit");
        std::fs::write(&path, vmm_exit()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Command::new(&path).args(arguments).output().unwrap()
    }

    #[test]
    fn it_runs_and_refuses_what_is_no_status() {
        for arguments in [&[][..], &[""], &["256"], &["-1"], &["1x"], &["4294967297"], &["1", "2"]] {
            let output = run(arguments);
            assert_eq!(output.status.code(), Some(1), "{arguments:?}");
            assert_eq!(output.stderr, b"usage: vmm-exit STATUS (0 to 255)\n", "{arguments:?}");
        }
    }
}
