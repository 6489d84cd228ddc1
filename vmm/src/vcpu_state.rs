//! A vCPU's state, saved and put back.
//!
//! In: a stopped vCPU, or a state from a snapshot. Out: the other of the two. Holds: `save` and `restore` name the same
//! fields in an order that KVM's documentation and other monitors' bugs taught; each list says why.

use crate::clock::{self, Moment};
use crate::kvm::{self, During, Ioctl};
use crate::msr::{self, MsrError, MsrState};
use kvm_bindings::{
    Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::fam::FamStruct;

/// Everything KVM holds of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What `cpuid` was told to answer; what the instruction adds of the vCPU's state (OSXSAVE and the like) is KVM's.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Runnable, halted, waiting for a start-up IPI.
    pub mp_state: kvm_mp_state,
    /// General registers, RIP, RFLAGS.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: Sregs,
    /// The XSAVE area: x87, SSE, AVX and on, as `KVM_GET_XSAVE2` gives it. At least 4096 bytes.
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// DR0–DR7.
    pub debug_regs: kvm_debugregs,
    /// The local APIC's register page.
    pub lapic: kvm_lapic_state,
    /// Frequency of the guest's TSC; `None` where KVM doesn't say.
    pub tsc_khz: Option<u32>,
    /// The guest's TSC at the one instant at which the whole machine was captured.
    pub tsc: u64,
    /// Model-specific registers.
    pub msrs: MsrState,
    /// Pending exceptions, interrupts, NMI and SMI.
    pub events: kvm_vcpu_events,
}

/// `kvm_sregs2`, which the bindings do not serialize: its fields in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sregs {
    /// cs, ds, es, fs, gs, ss, tr, ldt.
    pub segments: [kvm_segment; 8],
    /// GDT and IDT.
    pub tables: [kvm_dtable; 2],
    /// CR0, CR2, CR3, CR4, CR8, EFER, APIC base, flags.
    pub control: [u64; 8],
    /// Page-directory pointers of PAE paging.
    pub pdptrs: [u64; 4],
}

impl From<kvm_sregs2> for Sregs {
    fn from(s: kvm_sregs2) -> Self {
        Self {
            segments: [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt],
            tables: [s.gdt, s.idt],
            control: [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base, s.flags],
            pdptrs: s.pdptrs,
        }
    }
}

impl From<Sregs> for kvm_sregs2 {
    fn from(s: Sregs) -> Self {
        let [cs, ds, es, fs, gs, ss, tr, ldt] = s.segments;
        let [gdt, idt] = s.tables;
        let [cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags] = s.control;
        let pdptrs = s.pdptrs;
        Self {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }
}

/// Why a vCPU would not take a state.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// A KVM call failed.
    #[error(transparent)]
    Ioctl(#[from] Ioctl),
    /// A register was refused.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// The XSAVE area is not one.
    #[error("XSAVE area of {found} bytes; this host's KVM takes 4096 to {host} bytes")]
    XsaveSize {
        /// Bytes in the state.
        found: usize,
        /// Bytes that this host's KVM reads.
        host: usize,
    },
    /// The guest's TSC runs at a speed that this host can't give.
    #[error("the guest's TSC runs at {khz} kHz, and this host's KVM can't scale its own to that")]
    TscFrequency {
        /// The guest's frequency.
        khz: u32,
        /// What KVM answered.
        source: Ioctl,
    },
}

/// What saving and restoring needs to know of the host, found out once per machine.
#[derive(Clone, Debug)]
pub struct HostVcpu {
    /// Registers to save.
    pub msr_list: Vec<u32>,
    /// Bytes of an XSAVE area (`KVM_CAP_XSAVE2`).
    pub xsave_size: usize,
    /// Frequency of a TSC that is told no other, in kHz, if KVM says it.
    pub tsc_khz: Option<u32>,
}

impl HostVcpu {
    /// Whether a TSC that is to have this state's frequency surely has it, and counts as the host's does.
    pub fn has_tsc_of(&self, state: &VcpuState) -> bool {
        state.tsc_khz.is_none() || state.tsc_khz == self.tsc_khz
    }
}

/// Reads everything. The vCPU must be stopped, with no I/O left to complete.
///
/// Order: MP_STATE first, because reading it makes KVM work off pending INIT and SIPI, which changes the registers;
/// the timer's deadline, which is an MSR, before the LAPIC page, because where the timer's interrupt needs no exit (APICv) KVM may deliver (`apic_timer_expired`)
/// it between the two, though the vCPU stands still: the deadline is zero then, and the interrupt in the page. In this order it is in one of them, or
/// in both and the guest hears of it twice; in the other it could be in neither, and the guest would never hear that timer again;
/// events last, because reading XSAVE and the registers may move an injected exception into them. `cpuid` is what the vCPU
/// was made with: not every KVM gives back what it was given.
///
/// # Errors
/// The failed call.
pub fn save(
    vcpu: &VcpuFd,
    host: &HostVcpu,
    cpuid: &[kvm_cpuid_entry2],
    now: &Moment,
) -> Result<VcpuState, Ioctl> {
    let mp_state = vcpu.get_mp_state().during("KVM_GET_MP_STATE")?;
    let regs = vcpu.get_regs().during("KVM_GET_REGS")?;
    let sregs = kvm::get_sregs2(vcpu)?.into();
    let xsave = save_xsave(vcpu, host.xsave_size)?;
    let xcrs = vcpu.get_xcrs().during("KVM_GET_XCRS")?;
    let debug_regs = vcpu.get_debug_regs().during("KVM_GET_DEBUGREGS")?;
    let tsc_khz = vcpu.get_tsc_khz().ok();
    let cpuid = cpuid.to_vec();
    let msrs = msr::save(vcpu, &host.msr_list)?;
    let lapic = vcpu.get_lapic().during("KVM_GET_LAPIC")?;
    let tsc = now.tsc(vcpu).or(msrs.get(msr::TSC)).unwrap_or_default();
    let events = vcpu.get_vcpu_events().during("KVM_GET_VCPU_EVENTS")?;
    Ok(VcpuState { cpuid, mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, tsc, msrs, events })
}

/// Writes everything, in the order in which each value can be taken, `passed` nanoseconds of guest time after it was read.
///
/// CPUID was set when the vCPU was made: it decides which of the others are legal. The APIC base is in SREGS and decides how the LAPIC page is
/// read (x2APIC), so SREGS come before the LAPIC. The TSC before its deadline, and the deadline after the LAPIC, whose
/// timer mode it needs; one that has passed meanwhile fires once, as soon as the vCPU runs. Events last, because setting
/// registers clears pending exceptions.
///
/// # Errors
/// The first value that this host's KVM would not take.
pub fn restore(
    vcpu: &VcpuFd,
    host: &HostVcpu,
    state: &VcpuState,
    now: &Moment,
    passed: u64,
) -> Result<(), VcpuStateError> {
    vcpu.set_mp_state(state.mp_state).during("KVM_SET_MP_STATE")?;
    vcpu.set_regs(&state.regs).during("KVM_SET_REGS")?;
    kvm::set_sregs2(vcpu, &state.sregs.into())?;
    restore_xsave(vcpu, host.xsave_size, &state.xsave)?;
    vcpu.set_xcrs(&state.xcrs).during("KVM_SET_XCRS")?;
    vcpu.set_debug_regs(&state.debug_regs).during("KVM_SET_DEBUGREGS")?;
    vcpu.set_lapic(&state.lapic).during("KVM_SET_LAPIC")?;
    restore_tsc(vcpu, state, now, passed)?;
    msr::restore(vcpu, &state.msrs)?;
    restore_deadline(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).during("KVM_SET_VCPU_EVENTS")?;
    Ok(())
}

fn save_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, Ioctl> {
    let mut area = xsave_of(size);
    // SAFETY: the area has the size that KVM said it writes.
    unsafe { vcpu.get_xsave2(&mut area) }.during("KVM_GET_XSAVE2")?;
    let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

/// An area from a host with fewer features is shorter than this host's; the rest is zero, which is those features'
/// initial state, because the header's XSTATE_BV doesn't name them.
fn restore_xsave(vcpu: &VcpuFd, size: usize, bytes: &[u8]) -> Result<(), VcpuStateError> {
    if bytes.len() < XSAVE_MIN || bytes.len() > size || !bytes.len().is_multiple_of(4) {
        return Err(VcpuStateError::XsaveSize { found: bytes.len(), host: size });
    }
    let mut area = xsave_of(size);
    let mut words =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    // SAFETY: the length field is not changed.
    let head = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    head.iter_mut().zip(&mut words).for_each(|(slot, word)| *slot = word);
    area.as_mut_slice().iter_mut().zip(words).for_each(|(slot, word)| *slot = word);
    // SAFETY: the area has the size that KVM said it reads.
    unsafe { vcpu.set_xsave2(&area) }.during("KVM_SET_XSAVE")?;
    Ok(())
}

/// Bytes of the area that every KVM knows.
const XSAVE_MIN: usize = 4096;

fn xsave_of(size: usize) -> Xsave {
    let extra =
        size.saturating_sub(XSAVE_MIN).div_ceil(size_of::<<kvm_bindings::kvm_xsave2 as FamStruct>::Entry>());
    Xsave::new(extra).expect("an XSAVE area is a few pages")
}

/// Gives the vCPU's TSC the frequency that the guest was told.
///
/// # Errors
/// This host has another and can't scale it.
pub fn restore_tsc_frequency(
    vcpu: &VcpuFd,
    host: &HostVcpu,
    state: &VcpuState,
) -> Result<(), VcpuStateError> {
    match state.tsc_khz {
        Some(khz) if !host.has_tsc_of(state) && vcpu.get_tsc_khz().ok() != Some(khz) => {
            let set = vcpu.set_tsc_khz(khz).during("KVM_SET_TSC_KHZ");
            set.map_err(|source| VcpuStateError::TscFrequency { khz, source })
        }
        _ => Ok(()),
    }
}

/// The guest's TSC moves as far as kvmclock. Only where the offset attribute is missing is the register itself written;
/// KVM then takes writes within a second of each other for one synchronized set.
fn restore_tsc(vcpu: &VcpuFd, state: &VcpuState, now: &Moment, passed: u64) -> Result<(), VcpuStateError> {
    let tsc = clock::tsc_after(state.tsc, state.tsc_khz.unwrap_or_default(), passed);
    match now.tsc_offset(tsc) {
        Some(offset) => Ok(kvm::set_tsc_offset(vcpu, offset)?),
        None => Ok(msr::write(vcpu, msr::TSC, tsc)?),
    }
}

/// Zero means unarmed, and writing it would disarm a timer that the LAPIC page has armed in another mode.
fn restore_deadline(vcpu: &VcpuFd, msrs: &MsrState) -> Result<(), MsrError> {
    match msrs.get(msr::TSC_DEADLINE) {
        Some(deadline) if deadline != 0 => msr::write(vcpu, msr::TSC_DEADLINE, deadline),
        _ => Ok(()),
    }
}
