//! A vCPU: its file descriptor and how it is stopped.
//!
//! In: a VM. Out: a vCPU that can be run, saved and restored. Holds: a kick is never lost, whether it comes before, in or
//! after `KVM_RUN`.

use crate::clock::Moment;
use crate::cpuid;
use crate::kvm::{During, Ioctl};
use crate::msr;
use crate::vcpu_state::{self, HostVcpu, VcpuState, VcpuStateError};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuFd, VmFd};
use libc::{c_int, c_void, siginfo_t};
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
use vmm_sys_util::signal::register_signal_handler;

/// One vCPU of a machine.
#[derive(Debug)]
pub struct Vcpu {
    /// KVM's end of it.
    pub fd: VcpuFd,
    host: Arc<HostVcpu>,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether its guest may use kvmclock.
    may_have_clock: Cell<bool>,
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; the kick's signal handler sets it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The thread that it was made on is a vCPU's until it is dropped, there.
#[derive(Debug)]
pub struct Bound(PhantomData<*mut u8>);

impl Drop for Bound {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

impl Vcpu {
    /// Makes vCPU number `index`, its local APIC id as well, with these answers to `cpuid`.
    ///
    /// # Errors
    /// The failed call.
    pub fn new(
        vm: &VmFd,
        index: u32,
        host: Arc<HostVcpu>,
        cpuid: Vec<kvm_cpuid_entry2>,
    ) -> Result<Self, Ioctl> {
        let fd = vm.create_vcpu(u64::from(index)).during("KVM_CREATE_VCPU")?;
        fd.set_cpuid2(&cpuid::to_kvm(&cpuid)?).during("KVM_SET_CPUID2")?;
        Ok(Self { fd, host, cpuid, may_have_clock: Cell::new(true) })
    }

    /// Its state; it must be stopped, with its last I/O completed.
    ///
    /// # Errors
    /// The failed call.
    pub fn save(&self, now: &Moment) -> Result<VcpuState, Ioctl> {
        vcpu_state::save(&self.fd, &self.host, &self.cpuid, now)
    }

    /// Has its TSC run as fast as the state's; to be done before any clock is set.
    ///
    /// # Errors
    /// This host can't give that frequency.
    pub fn restore_tsc_frequency(&self, state: &VcpuState) -> Result<(), VcpuStateError> {
        vcpu_state::restore_tsc_frequency(&self.fd, &self.host, state)
    }

    /// Puts a state into it, `passed` nanoseconds of guest time after it was read.
    ///
    /// # Errors
    /// The first value that KVM would not take.
    pub fn restore(&self, state: &VcpuState, now: &Moment, passed: u64) -> Result<(), VcpuStateError> {
        self.may_have_clock.set(msr::has_kvmclock(&state.msrs));
        vcpu_state::restore(&self.fd, &self.host, state, now, passed)
    }

    /// Tells a guest that uses kvmclock that it was stopped, so that its watchdogs don't count the time. A guest that
    /// doesn't use it, or not yet, makes KVM answer EINVAL, which is fine, and takes as long; one that is to run for the first time after a
    /// state of which it is known isn't told.
    pub fn tell_was_stopped(&self) {
        if self.may_have_clock.replace(true) {
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// Binds the vCPU to the calling thread: from now on a kick of this thread stops it. The binding must end before the vCPU is
    /// dropped.
    pub fn bind_to_thread(&mut self) -> Bound {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(immediate_exit);
        Bound(PhantomData)
    }

    /// Forgets a kick that was seen.
    pub fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Has the next `KVM_RUN` finish what the last exit began, and nothing more.
    pub fn kick_self(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
    }
}

/// Whether the vCPU that this thread runs has been kicked; `false` on any other thread.
pub fn kick_pending() -> bool {
    let flag = IMMEDIATE_EXIT.get();
    // SAFETY: as in the handler: a pointer that is set is into the kvm_run page of a live vCPU.
    !flag.is_null() && unsafe { flag.read_volatile() } != 0
}

/// The signal that kicks a vCPU's thread.
pub fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

/// Installs the kick's handler for the whole process; doing so again changes nothing.
///
/// # Errors
/// What the host said.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        let flag = IMMEDIATE_EXIT.get();
        if !flag.is_null() {
            // SAFETY: the pointer is into the kvm_run page of the vCPU that this thread is bound to, and is cleared
            // before that vCPU is dropped.
            unsafe { flag.write_volatile(1) };
        }
    }
    register_signal_handler(kick_signal(), kicked)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}
