//! What kvm-ioctls doesn't wrap, and the one shape of a KVM failure.
//!
//! In: file descriptors of vCPUs. Out: their answers as bindings' structs, or an [`Ioctl`] that names the call. Holds:
//! every `ioctl` of our own is here.

use kvm_bindings::{
    KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr,
    kvm_pre_fault_memory, kvm_sregs2,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::ops::Range;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed: {source}")]
pub struct Ioctl {
    /// The call's name in the KVM API.
    pub call: &'static str,
    /// What the kernel answered.
    pub source: errno::Error,
}

/// Gives a bare `errno` the name of the call it came from.
pub trait During<T> {
    /// Names the call.
    ///
    /// # Errors
    /// The same failure, named.
    fn during(self, call: &'static str) -> Result<T, Ioctl>;
}

impl<T> During<T> for Result<T, errno::Error> {
    fn during(self, call: &'static str) -> Result<T, Ioctl> {
        self.map_err(|source| Ioctl { call, source })
    }
}

#[allow(
    missing_docs,
    reason = "the macros make functions that can carry no comment; the KVM API documents them"
)]
mod numbers {
    use super::*;

    ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use numbers::*;

fn checked(ret: i32, call: &'static str) -> Result<(), Ioctl> {
    if ret < 0 { Err(errno::Error::last()).during(call) } else { Ok(()) }
}

/// `KVM_GET_SREGS2`: segment and control registers, page-directory pointers included.
///
/// # Errors
/// The failed call.
pub fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Ioctl> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the fd is a vCPU's, and the kernel writes one kvm_sregs2.
    let ret = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) };
    checked(ret, "KVM_GET_SREGS2").map(|()| sregs)
}

/// `KVM_SET_SREGS2`.
///
/// # Errors
/// The failed call.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Ioctl> {
    // SAFETY: the fd is a vCPU's, and the kernel reads one kvm_sregs2.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) };
    checked(ret, "KVM_SET_SREGS2")
}

/// `KVM_PRE_FAULT_MEMORY`: maps guest memory as if the vCPU had read it (Linux 6.10 and later, with nested paging). Whole pages.
///
/// # Errors
/// The failed call; some of the memory may have been mapped.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> Result<(), Ioctl> {
    let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    loop {
        // SAFETY: the fd is a vCPU's; the kernel reads one kvm_pre_fault_memory, and writes to it what is left to do.
        let ret = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
        let again = ret == 0 || [libc::EINTR, libc::EAGAIN].contains(&errno::Error::last().errno());
        if range.size == 0 || !again {
            return checked(ret, "KVM_PRE_FAULT_MEMORY");
        }
    }
}

/// Whether [`pre_fault`] can do anything here: Linux 6.10 and later, with nested paging.
pub fn can_pre_fault(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0
}

/// The frequency that the TSC of a vCPU of this VM has unless it is told another, in kHz: the host's. `None` where KVM says it of vCPUs only
/// (before Linux 5.18).
pub fn tsc_khz(vm: &VmFd) -> Option<u32> {
    // SAFETY: the fd is a VM's; the call takes and writes nothing.
    let khz = unsafe { ioctl(vm, KVM_GET_TSC_KHZ()) };
    u32::try_from(khz).ok().filter(|khz| *khz != 0)
}

/// The vCPU's TSC offset (`KVM_VCPU_TSC_OFFSET`): guest TSC = scaled host TSC + offset. `None` where KVM has no such
/// attribute (before Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(&raw mut offset as u64);
    // SAFETY: the fd is a vCPU's; the kernel writes the u64 that `addr` points to, which outlives the call.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (ret == 0).then_some(offset)
}

/// Sets the vCPU's TSC offset.
///
/// # Errors
/// The failed call.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Ioctl> {
    let attr = tsc_offset_attr(&raw const offset as u64);
    // SAFETY: the fd is a vCPU's; the kernel reads the u64 that `addr` points to, which outlives the call.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    checked(ret, "KVM_SET_DEVICE_ATTR(TSC_OFFSET)")
}

fn tsc_offset_attr(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr,
        flags: 0,
    }
}

/// `KVM_CLEAR_DIRTY_LOG`: has the pages of these words, of which a bit is set, logged anew when they are written. `pages` are those of the
/// memory slot; all of its other words are left out.
///
/// # Errors
/// The failed call.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, pages: Range<u64>, words: &[u64]) -> Result<(), Ioctl> {
    assert!(words.len() as u64 * 64 >= pages.end - pages.start, "KVM reads a bit for each page");
    let bits = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_ptr() as *mut _ };
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: (pages.end - pages.start) as u32,
        first_page: pages.start,
        __bindgen_anon_1: bits,
    };
    // SAFETY: the fd is a VM; KVM reads as many bits as there are pages, and writes nothing.
    checked(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) }, "KVM_CLEAR_DIRTY_LOG")
}
