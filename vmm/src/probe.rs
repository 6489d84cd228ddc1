//! A throwaway VM that runs a few bytes of machine code, to find out what this host's KVM does with them.
//!
//! In: machine code, registers, a privilege level. Out: the registers when the code has written to [`END_PORT`], or what
//! happened instead. Holds: a run ends within [`LIMIT`], whatever KVM does.
//!
//! ```text
//!    0  page tables: the first 2 MiB one to one, open to ring 3
//! 4000  GDT        5000  IDT: only breakpoints have a handler
//! 6000  handler    7000  code    9000  end of the stack    a000  data
//! ```

use crate::dirty_log::DirtyLog;
use crate::fault::Fault;
use crate::kvm::{During, Ioctl};
use crate::ram::{GuestRam, RamError};
use crate::vm;
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::register_signal_handler;

/// Writing a byte here ends a run.
pub(crate) const END_PORT: u16 = 0xf4;
/// Where code may keep data; aligned to a page.
pub(crate) const DATA: u64 = 0xa000;
/// The longest that a run may take.
pub(crate) const LIMIT: Duration = Duration::from_millis(500);
/// How often a run that goes on is interrupted to look at the clock.
const TICK: Duration = Duration::from_millis(10);

const MEMORY: u64 = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLER: u64 = 0x6000;
const CODE: u64 = 0x7000;
const STACK_END: u64 = 0x9000;

/// Ring 0 code and data; ring 3 32-bit code, data and 64-bit code, in the order that SYSRET wants (Intel SDM 2,
/// SYSRET).
const DESCRIPTORS: [u64; 6] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
const BREAKPOINT: u64 = 3;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;

/// The privilege level that code starts at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    Kernel,
    User,
}

/// Why no VM could be made for a probe.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
    #[error("cannot write the probe's memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("cannot make a timer: {0}")]
    Timer(#[source] io::Error),
}

/// How a run ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The code came to its end.
    Reached(Box<kvm_regs>),
    /// KVM stopped it.
    Fault(Fault),
    /// It was still running after [`LIMIT`].
    TimedOut,
}

/// A VM with one vCPU.
pub(crate) struct Bench {
    pub(crate) vcpu: VcpuFd,
    vm: Arc<VmFd>,
    pub(crate) ram: GuestRam,
}

impl Bench {
    pub(crate) fn new(kvm: &Kvm, entries: &[kvm_cpuid_entry2]) -> Result<Self, ProbeError> {
        let ram = GuestRam::new(MEMORY)?;
        let vm = vm::create(kvm, Some(&ram))?;
        let vcpu = vm.create_vcpu(0).during("KVM_CREATE_VCPU")?;
        let entries = CpuId::from_entries(entries).expect("KVM's own entries fit into its own limit");
        vcpu.set_cpuid2(&entries).during("KVM_SET_CPUID2")?;
        let bench = Self { vcpu, vm, ram };
        bench.write_tables()?;
        Ok(bench)
    }

    fn write_tables(&self) -> Result<(), ProbeError> {
        // Present, writable, open to ring 3; the last one is a 2 MiB page.
        for (table, entry) in [(PML4, PDPT | 7), (PDPT, PAGE_DIRECTORY | 7), (PAGE_DIRECTORY, 0x87)] {
            self.write(table, &entry.to_le_bytes())?;
        }
        self.write(GDT, &DESCRIPTORS.map(u64::to_le_bytes).concat())?;
        // A 64-bit interrupt gate (Intel SDM 3A, 6.14.1); the handler is below 64 KiB.
        let gate = HANDLER | 8 << 16 | 0x8e00 << 32;
        self.write(IDT + BREAKPOINT * 16, &gate.to_le_bytes())
    }

    /// Begins to log what is written into its memory.
    pub(crate) fn log(&self) -> Result<DirtyLog, ProbeError> {
        Ok(DirtyLog::start(&self.vm, &self.ram)?)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), ProbeError> {
        Ok(self.ram.memory().write_slice(bytes, GuestAddress(address))?)
    }

    /// Sets what runs after a breakpoint or a `syscall`.
    pub(crate) fn set_handler(&self, code: &[u8]) -> Result<(), ProbeError> {
        self.write(HANDLER, code)?;
        self.set_msrs(&[(MSR_STAR, 0x1b << 48 | 8 << 32), (MSR_LSTAR, HANDLER)])
    }

    pub(crate) fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<(), ProbeError> {
        let entry = |&(index, data)| kvm_msr_entry { index, data, ..Default::default() };
        let entries: Vec<_> = msrs.iter().map(entry).collect();
        let entries = Msrs::from_entries(&entries).expect("a few MSRs fit");
        self.vcpu.set_msrs(&entries).during("KVM_SET_MSRS")?;
        Ok(())
    }

    /// Runs code in 64-bit mode until it writes to [`END_PORT`], which ring 3 may do where RFLAGS.IOPL is 3.
    pub(crate) fn run(&mut self, code: &[u8], regs: kvm_regs, ring: Ring) -> Result<End, ProbeError> {
        self.write(CODE, code)?;
        let mut sregs = self.vcpu.get_sregs().during("KVM_GET_SREGS")?;
        enter_long_mode(&mut sregs, ring);
        self.vcpu.set_sregs(&sregs).during("KVM_SET_SREGS")?;
        let regs = kvm_regs { rip: CODE, rsp: STACK_END, rflags: 2 | regs.rflags, ..regs };
        self.vcpu.set_regs(&regs).during("KVM_SET_REGS")?;
        self.until_end()
    }

    fn until_end(&mut self) -> Result<End, ProbeError> {
        let begun = Instant::now();
        let _ticker = Ticker::start().map_err(ProbeError::Timer)?;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(END_PORT, _)) => break,
                Ok(_) => return Ok(End::Fault(Fault::of(self.vcpu.get_kvm_run()))),
                Err(e) if e.errno() == libc::EINTR && begun.elapsed() < LIMIT => {}
                Err(e) if e.errno() == libc::EINTR => return Ok(End::TimedOut),
                Err(source) => return Err(Ioctl { call: "KVM_RUN", source }.into()),
            }
        }
        self.complete_output();
        let regs = self.vcpu.get_regs().during("KVM_GET_REGS")?;
        Ok(End::Reached(Box::new(regs)))
    }

    /// Has KVM step past the `out`, which it would else do on the next run's registers.
    fn complete_output(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        // EINTR, as asked for.
        let _ = self.vcpu.run();
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

/// Paging on, SSE and `syscall` allowed, a supervisor's write protection as Linux has it.
fn enter_long_mode(sregs: &mut kvm_sregs, ring: Ring) {
    let (code, data) = match ring {
        Ring::Kernel => (segment(0x08, 0xb, 0), segment(0x10, 3, 0)),
        Ring::User => (segment(0x2b, 0xb, 3), segment(0x23, 3, 3)),
    };
    sregs.cs = kvm_segment { l: 1, db: 0, ..code };
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    sregs.gdt = kvm_dtable { base: GDT, limit: size_of_val(&DESCRIPTORS) as u16 - 1, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT, limit: (BREAKPOINT as u16 + 1) * 16 - 1, ..Default::default() };
    sregs.cr3 = PML4;
    // PE, MP, ET, NE, WP, PG · PAE, OSFXSR, OSXMMEXCPT · SCE, LME, LMA
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x8001_0033, 0x620, 0x501);
}

fn segment(selector: u16, type_: u8, dpl: u8) -> kvm_segment {
    kvm_segment { selector, type_, dpl, limit: !0, present: 1, s: 1, g: 1, db: 1, ..Default::default() }
}

/// Interrupts this thread's `KVM_RUN` again and again. A signal that comes too early is made up for by the next.
struct Ticker(libc::timer_t);

impl Ticker {
    fn start() -> io::Result<Self> {
        extern "C" fn ticked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        // The first real-time signal is a running machine's kick.
        let signal = libc::SIGRTMIN() + 1;
        register_signal_handler(signal, ticked).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        // SAFETY: a sigevent is plain numbers, for which zero is a value; gettid takes nothing.
        let (mut event, thread) = unsafe { (std::mem::zeroed::<libc::sigevent>(), libc::gettid()) };
        (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_THREAD_ID, signal);
        event.sigev_notify_thread_id = thread;
        let mut id = std::ptr::null_mut();
        // SAFETY: `event` is a whole sigevent, and `id` takes a timer.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id) })?;
        let ticker = Self(id);
        let every = libc::timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
        let setting = libc::itimerspec { it_interval: every, it_value: every };
        // SAFETY: the timer exists, `setting` is whole, and the old setting isn't asked for.
        check(unsafe { libc::timer_settime(id, 0, &setting, std::ptr::null_mut()) })?;
        Ok(ticker)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        // SAFETY: the timer exists, and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
