//! NT_PRSTATUS: a vCPU's registers, where debuggers look for a thread's.
//!
//! In: registers that the caller has copied from its vCPU. Out: Linux's `struct elf_prstatus` for x86-64. Holds: this
//! is a view for people; a restore takes registers from the machine state.

/// Bytes of `struct elf_prstatus`.
pub(crate) const PRSTATUS_LEN: usize = snapshot_format::PRSTATUS_LEN as usize;
/// Offset of `pr_pid`.
const PR_PID: usize = 32;
/// Offset of `pr_reg`: 27 registers in the order of `struct user_regs_struct`.
const PR_REG: usize = 112;

/// A vCPU's general-purpose registers; segment registers are selectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the register of that name")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u16,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
}

impl Registers {
    /// In the order of `struct user_regs_struct` (Linux `arch/x86/include/asm/user_64.h`). `orig_rax` is -1: no system
    /// call is to be restarted.
    fn in_order(&self) -> [u64; 27] {
        let r = self;
        let [cs, ss, ds, es, fs, gs] = [r.cs, r.ss, r.ds, r.es, r.fs, r.gs].map(u64::from);
        [
            r.r15,
            r.r14,
            r.r13,
            r.r12,
            r.rbp,
            r.rbx,
            r.r11,
            r.r10,
            r.r9,
            r.r8,
            r.rax,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            u64::MAX,
            r.rip,
            cs,
            r.rflags,
            r.rsp,
            ss,
            r.fs_base,
            r.gs_base,
            ds,
            es,
            fs,
            gs,
        ]
    }

    /// The descriptor for vCPU `index`, which shows as thread `index + 1`.
    pub(crate) fn prstatus(&self, index: u32) -> [u8; PRSTATUS_LEN] {
        let mut out = [0; PRSTATUS_LEN];
        out[PR_PID..PR_PID + 4].copy_from_slice(&(index + 1).to_le_bytes());
        for (place, register) in out[PR_REG..].chunks_exact_mut(8).zip(self.in_order()) {
            place.copy_from_slice(&register.to_le_bytes());
        }
        out
    }
}
