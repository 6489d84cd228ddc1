//! The floor: the least sequence of KVM calls that gives a VM of a machine's shape, with all state set, its first instruction.
//!
//! In: `/dev/kvm`, a memory size. Out: how long it took. Holds: what a monitor has already is ready before the clock runs (RAM, the
//! state, `/dev/kvm` open); no thread, no device, no check.

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::ram::GuestRam;

/// Where the first instructions are, in real mode: `mov al, 1` and `out 0x80, al`, which is an exit.
const START: u64 = 0x1000;
const CODE: [u8; 4] = [0xb0, 1, 0xe6, 0x80];
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// A machine of one vCPU that is ready to be made.
pub struct Floor {
    kvm: Kvm,
    ram: GuestRam,
    state: State,
}

/// What KVM holds for a VM with one vCPU.
struct State {
    cpuid: CpuId,
    mp: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    events: kvm_vcpu_events,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    chips: Vec<kvm_irqchip>,
}

impl Floor {
    /// With so much RAM, of which one page is touched.
    ///
    /// # Errors
    /// There is no KVM, or it does not do what the floor is made of.
    pub fn new(memory: u64) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let ram = GuestRam::new(memory)?;
        ram.memory().write_slice(&CODE, GuestAddress(START))?;
        let state = State::read(&kvm)?;
        Ok(Self { kvm, ram, state })
    }

    /// One machine, from nothing to its first exit.
    ///
    /// # Errors
    /// A call fails, or the exit is another.
    pub fn measure(&self) -> Result<Duration> {
        let begun = Instant::now();
        let vm = create(&self.kvm, Some(&self.ram))?;
        let mut vcpu = vm.create_vcpu(0)?;
        self.state.write(&vm, &vcpu)?;
        match vcpu.run()? {
            VcpuExit::IoOut(0x80, _) => Ok(begun.elapsed()),
            other => bail!("the first exit is {other:?}"),
        }
    }
}

fn create(kvm: &Kvm, ram: Option<&GuestRam>) -> Result<VmFd> {
    let vm = kvm.create_vm()?;
    vm.set_identity_map_address(IDENTITY_MAP)?;
    vm.set_tss_address(TSS)?;
    for (slot, region) in ram.iter().flat_map(|ram| ram.memory().iter()).enumerate() {
        let memslot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the RAM outlives every VM that is measured.
        unsafe { vm.set_user_memory_region(memslot) }?;
    }
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    Ok(vm)
}

impl State {
    /// After reset, but for where it starts.
    fn read(kvm: &Kvm) -> Result<Self> {
        let vm = create(kvm, None)?;
        let vcpu = vm.create_vcpu(0)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        vcpu.set_cpuid2(&cpuid)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        let chip = |id| -> Result<_> {
            let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
            vm.get_irqchip(&mut chip)?;
            Ok(chip)
        };
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        Ok(Self {
            cpuid,
            mp: vcpu.get_mp_state()?,
            regs: kvm_regs { rip: START, rflags: 2, ..Default::default() },
            sregs,
            xsave: vcpu.get_xsave()?,
            xcrs: vcpu.get_xcrs()?,
            debug: vcpu.get_debug_regs()?,
            lapic: vcpu.get_lapic()?,
            msrs: msrs(kvm, &vcpu)?,
            events: vcpu.get_vcpu_events()?,
            pit: vm.get_pit2()?,
            clock: kvm_clock_data { flags: 0, ..vm.get_clock()? },
            chips: chips.into_iter().map(chip).collect::<Result<_>>()?,
        })
    }

    fn write(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_cpuid2(&self.cpuid)?;
        vcpu.set_mp_state(self.mp)?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_sregs(&self.sregs)?;
        // SAFETY: the state is of this KVM, as long as it says, and no dynamic feature is on.
        unsafe { vcpu.set_xsave(&self.xsave) }?;
        vcpu.set_xcrs(&self.xcrs)?;
        vcpu.set_debug_regs(&self.debug)?;
        vcpu.set_lapic(&self.lapic)?;
        vcpu.set_msrs(&self.msrs)?;
        vcpu.set_vcpu_events(&self.events)?;
        vm.set_pit2(&self.pit)?;
        vm.set_clock(&self.clock)?;
        for chip in &self.chips {
            vm.set_irqchip(chip)?;
        }
        Ok(())
    }
}

/// Those that can be read and written back.
fn msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Msrs> {
    let mut entries = Vec::new();
    for &index in kvm.get_msr_index_list()?.as_slice() {
        let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
        if vcpu.get_msrs(&mut one).is_ok_and(|read| read == 1)
            && vcpu.set_msrs(&one).is_ok_and(|set| set == 1)
        {
            entries.push(one.as_slice()[0]);
        }
    }
    Ok(Msrs::from_entries(&entries)?)
}
