//! `kvm_probe`: does `/dev/kvm` run code?
//!
//! In: nothing. Out: `kvm: 40 + 2 = 42`, added up by a virtual machine of seven bytes of real-mode code. Holds: it shares
//! no code with `vmm`, so it tells whether a failure is the monitor's or the host's.

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// `mov al, 40; add al, 2; out 0xf4, al; hlt`
const CODE: [u8; 7] = [0xb0, 40, 0x04, 2, 0xe6, 0xf4, 0xf4];
const ENTRY: u64 = 0x1000;

/// A page of guest memory.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn main() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    let mut page = Box::new(Page([0; 4096]));
    page.0[..CODE.len()].copy_from_slice(&CODE);
    map(&vm, &mut page)?;
    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    aim(&vcpu)?;
    match vcpu.run().context("the vCPU doesn't run")? {
        VcpuExit::IoOut(0xf4, &[sum]) => println!("kvm: 40 + 2 = {sum}"),
        exit => bail!("expected an output to port 0xf4, got {exit:?}"),
    }
    Ok(())
}

fn map(vm: &VmFd, page: &mut Page) -> Result<()> {
    let region = kvm_userspace_memory_region {
        guest_phys_addr: ENTRY,
        memory_size: page.0.len() as u64,
        userspace_addr: page.0.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the page outlives the VM, and nothing else uses it while a vCPU runs.
    unsafe { vm.set_user_memory_region(region) }.context("cannot map memory")
}

/// Real mode, at the entry.
fn aim(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (ENTRY, 2);
    Ok(vcpu.set_regs(&regs)?)
}
