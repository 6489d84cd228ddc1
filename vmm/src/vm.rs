//! The KVM VM: memory slots, interrupt controllers, timer chip.
//!
//! In: a KVM handle and guest RAM. Out: a VM file descriptor that vCPUs can be made on. Holds: memory slots are
//! registered before the interrupt controllers are created, since on a host with shadow paging the other order costs
//! milliseconds for each GiB.

use crate::kvm::{self, During, Ioctl};
use crate::layout;
use crate::ram::GuestRam;
use crate::vcpu_state::HostVcpu;
use devices::MemoryRegion;
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::sync::Arc;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// How often a VM is asked for that a signal comes in between of.
const TRIES: usize = 100;

/// Why there is no KVM to work with.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No device node.
    #[error("/dev/kvm is not there: this host has no KVM, or its module is not loaded")]
    Missing,
    /// A node that this user may not open.
    #[error("/dev/kvm can't be opened: permission denied (its group, often `kvm`, may open it)")]
    Permission,
    /// Anything else.
    #[error(transparent)]
    Other(#[from] Ioctl),
    /// The name is something else's.
    #[error("/dev/kvm is not a KVM device with API version 12")]
    NotKvm,
    /// KVM lacks something without which a machine can't be saved whole.
    #[error("this host's KVM lacks {0}, which this monitor needs (Linux 5.17 and later have it)")]
    Lacks(&'static str),
}

/// Opens `/dev/kvm` and checks that it has what a machine needs.
///
/// # Errors
/// No device, no permission, or a KVM that is too old.
pub fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::Missing,
        libc::EACCES | libc::EPERM => OpenError::Permission,
        _ => OpenError::Other(Ioctl { call: "open(/dev/kvm)", source: error }),
    })?;
    if kvm.get_api_version() != kvm_bindings::KVM_API_VERSION as i32 {
        return Err(OpenError::NotKvm);
    }
    let sregs2 = i32::from(kvm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_SREGS2)) > 0);
    match (sregs2, kvm.check_extension(Cap::Xsave2), kvm.check_extension(Cap::ImmediateExit)) {
        (0, ..) => Err(OpenError::Lacks("KVM_CAP_SREGS2")),
        (_, false, _) => Err(OpenError::Lacks("KVM_CAP_XSAVE2")),
        (.., false) => Err(OpenError::Lacks("KVM_CAP_IMMEDIATE_EXIT")),
        _ => Ok(kvm),
    }
}

/// Makes a VM around the RAM, or around none: such a VM never runs, and shows what KVM's reset state is.
///
/// # Errors
/// The failed call.
pub fn create(kvm: &Kvm, ram: Option<&GuestRam>) -> Result<Arc<VmFd>, Ioctl> {
    furnish(empty(kvm)?, ram)
}

/// A VM with nothing in it, which takes KVM the longest of all.
///
/// KVM looks whether a signal is pending while it takes locks (`mmu_notifier_register`), and to Linux word from an io_uring that this thread has
/// used is one, too: a disk's, at a switch between kernels. It is delivered as the call returns, so the next finds none.
///
/// # Errors
/// The failed call.
pub fn empty(kvm: &Kvm) -> Result<VmFd, Ioctl> {
    let mut made = kvm.create_vm();
    for _ in 0..TRIES {
        match made {
            Err(error) if error.errno() == libc::EINTR => made = kvm.create_vm(),
            _ => break,
        }
    }
    made.during("KVM_CREATE_VM")
}

/// Puts into an empty VM what every machine has, and the RAM, if it is to run.
///
/// # Errors
/// The failed call.
pub fn furnish(vm: VmFd, ram: Option<&GuestRam>) -> Result<Arc<VmFd>, Ioctl> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).during("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(layout::KVM_TSS as usize).during("KVM_SET_TSS_ADDR")?;
    tell_all_events(&vm)?;
    if let Some(ram) = ram {
        register_memslots(&vm, ram)?;
    }
    vm.create_irq_chip().during("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).during("KVM_CREATE_PIT2")?;
    Ok(Arc::new(vm))
}

/// Has KVM tell pending events whole. Without this it gives up a pending exception's payload when it is asked for events,
/// and writes it into CR2 or DR6, which have been saved by then; and a pending triple fault is not told at all.
fn tell_all_events(vm: &VmFd) -> Result<(), Ioctl> {
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        if vm.check_extension_raw(cap.into()) > 0 {
            let enable = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&enable).during("KVM_ENABLE_CAP")?;
        }
    }
    Ok(())
}

/// What saving and restoring a vCPU of this VM needs to know.
pub fn host_vcpu(vm: &VmFd, msr_list: Vec<u32>) -> HostVcpu {
    let xsave_size = vm.check_extension_int(Cap::Xsave2).max(4096) as usize;
    HostVcpu { msr_list, xsave_size, tsc_khz: kvm::tsc_khz(vm) }
}

/// Guest RAM takes the first slots, in order; windows follow.
fn register_memslots(vm: &VmFd, ram: &GuestRam) -> Result<(), Ioctl> {
    let own = ram.memory().iter().map(|region| (0, 0, region));
    let windows = ram.windows().iter();
    let windows =
        windows.flat_map(|window| window.memory.iter().map(|region| (window.base, KVM_MEM_READONLY, region)));
    let mut slots = own.chain(windows).zip(0..);
    slots.try_for_each(|((base, flags, region), slot)| set_memslot(vm, slot, base, flags, region))
}

/// Has KVM log the pages of RAM that are written by the guest, or by KVM for it, or no longer. The guest may run.
///
/// # Errors
/// The failed call.
pub(crate) fn log_writes(vm: &VmFd, ram: &GuestRam, log: bool) -> Result<(), Ioctl> {
    let flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    ram.memory().iter().zip(0..).try_for_each(|(region, slot)| set_memslot(vm, slot, 0, flags, region))
}

fn set_memslot(vm: &VmFd, slot: u32, base: u64, flags: u32, region: &MemoryRegion) -> Result<(), Ioctl> {
    let memslot = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: base + region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the mapping lives as long as the machine: `Machine` holds VM and RAM and drops the VM first.
    unsafe { vm.set_user_memory_region(memslot) }.during("KVM_SET_USER_MEMORY_REGION")
}
