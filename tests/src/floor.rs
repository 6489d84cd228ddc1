//! The floor: the least sequence of KVM calls that gives a VM of a machine's shape, with all state set, its first instruction.
//!
//! In: `/dev/kvm`, a memory size or a snapshot. Out: how long it took. Holds: what a monitor has to find out first is there before the
//! clock runs (`/dev/kvm` open, the state decoded); RAM of a snapshot is mapped while it runs; no thread, no device, no check.

use anyhow::{Context, Result, ensure};
use devices::{Memory, MemoryRegion};
use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MAX_MSR_ENTRIES, Msrs,
    kvm_clock_data, kvm_enable_cap, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs2,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use snapshot::Snapshot;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::capture::MachineState;
use vmm::config::Shape;
use vmm::msr::{TSC, TSC_DEADLINE};
use vmm::ram::{FileRange, GuestRam};
use vmm::vcpu_state::VcpuState;
use vmm::{cpuid, kvm, layout, load};

/// Where the first instructions are, in real mode: `mov al, 1` and `out 0x80, al`, which is an exit.
const START: u64 = 0x1000;
const CODE: [u8; 4] = [0xb0, 1, 0xe6, 0x80];
/// Writing one of these is a command to write to guest memory (kvmclock's wall clock, old and new number).
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// A machine of one vCPU that is ready to be made.
pub struct Floor {
    kvm: Kvm,
    ram: Ram,
    state: State,
}

/// How long it took, from nothing.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Until `KVM_RUN` is to be called.
    pub entered: Duration,
    /// Until it returned with the first exit.
    pub answered: Duration,
}

/// Where RAM comes from.
enum Ram {
    /// It is there.
    Kept(GuestRam),
    /// A private mapping of these ranges of a file, to be made.
    Mapped(File, Vec<FileRange>),
}

/// What KVM takes.
struct State {
    machine: MachineState,
    cpuid: CpuId,
    xsave: kvm_xsave,
    msrs: Vec<Msrs>,
}

impl Floor {
    /// After reset, with so much RAM, which is there, and one page of it touched.
    ///
    /// # Errors
    /// There is no KVM, or it does not do what the floor is made of.
    pub fn new(memory: u64) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let ram = GuestRam::new(memory)?;
        ram.memory().write_slice(&CODE, GuestAddress(START))?;
        let shape = Shape { name: "floor".to_owned(), vcpus: 1, memory, kernel: Default::default() };
        let mut machine = MachineState::at_reset(&kvm, shape)?;
        let vcpu = &mut machine.vcpus[0];
        vcpu.regs = kvm_regs { rip: START, rflags: 2, ..Default::default() };
        let mut sregs = kvm_sregs2::from(vcpu.sregs);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.sregs = sregs.into();
        let state = State::of(&kvm, machine)?;
        Ok(Self { kvm, ram: Ram::Kept(ram), state })
    }

    /// A snapshot's machine, which has one vCPU.
    ///
    /// # Errors
    /// The same, or it is none.
    pub fn of_snapshot(file: &Path) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let snapshot = load::open(file)?;
        let state = State::of(&kvm, load::state(&snapshot)?)?;
        let ram = Ram::Mapped(snapshot.file().try_clone()?, ranges(&snapshot));
        Ok(Self { kvm, ram, state })
    }

    /// One machine, from nothing to its first exit.
    ///
    /// # Errors
    /// A call fails, or the exit is no access to a port.
    pub fn measure(&self) -> Result<Took> {
        let begun = Instant::now();
        let mapping = self.ram.map()?;
        let vm = create(&self.kvm, mapping.as_ref().unwrap_or(self.ram.memory()))?;
        let mut vcpu = vm.create_vcpu(0)?;
        self.state.write(&vm, &vcpu)?;
        let entered = begun.elapsed();
        let exit = vcpu.run()?;
        let answered = begun.elapsed();
        ensure!(matches!(exit, VcpuExit::IoOut(..) | VcpuExit::IoIn(..)), "the first exit is {exit:?}");
        Ok(Took { entered, answered })
    }

    /// The same, up to where `KVM_RUN` would be called.
    ///
    /// # Errors
    /// A call fails.
    pub fn measure_entry(&self) -> Result<Duration> {
        let begun = Instant::now();
        let mapping = self.ram.map()?;
        let vm = create(&self.kvm, mapping.as_ref().unwrap_or(self.ram.memory()))?;
        let vcpu = vm.create_vcpu(0)?;
        self.state.write(&vm, &vcpu)?;
        Ok(begun.elapsed())
    }
}

fn ranges(snapshot: &Snapshot) -> Vec<FileRange> {
    let range = |mapped: &snapshot::MappedRange| FileRange {
        gpa: mapped.range.gpa,
        len: mapped.range.len,
        offset: mapped.offset,
    };
    snapshot.ram().iter().map(range).collect()
}

impl Ram {
    fn memory(&self) -> &Memory {
        static NONE: std::sync::LazyLock<Memory> = std::sync::LazyLock::new(Memory::new);
        match self {
            Self::Kept(ram) => ram.memory(),
            Self::Mapped(..) => &NONE,
        }
    }

    /// The mapping, if there has to be a new one.
    fn map(&self) -> Result<Option<Memory>> {
        let Self::Mapped(file, ranges) = self else { return Ok(None) };
        let map = |range: &FileRange| -> Result<_> {
            let region = MmapRegionBuilder::new(range.len as usize)
                .with_file_offset(FileOffset::new(file.try_clone()?, range.offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()?;
            MemoryRegion::new(region, GuestAddress(range.gpa)).context("a range ends nowhere")
        };
        let regions = ranges.iter().map(map).collect::<Result<Vec<_>>>()?;
        Ok(Some(Memory::from_regions(regions)?))
    }
}

fn create(kvm: &Kvm, memory: &Memory) -> Result<VmFd> {
    let vm = kvm.create_vm()?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)?;
    vm.set_tss_address(layout::KVM_TSS as usize)?;
    // The events of a saved vCPU say all that these let KVM tell.
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        vm.enable_cap(&kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() })?;
    }
    for (slot, region) in memory.iter().enumerate() {
        let memslot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the RAM outlives the VM, which is made after it in every function, and so dropped before it.
        unsafe { vm.set_user_memory_region(memslot) }?;
    }
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    Ok(vm)
}

impl State {
    fn of(kvm: &Kvm, machine: MachineState) -> Result<Self> {
        ensure!(machine.vcpus.len() == 1, "{} vCPUs: the floor has one", machine.vcpus.len());
        let vcpu = &machine.vcpus[0];
        ensure!(vcpu.xsave.len() == size_of::<[u32; 1024]>(), "XSAVE of {} bytes", vcpu.xsave.len());
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(vcpu.xsave.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into()?);
        }
        let cpuid = cpuid::to_kvm(&vcpu.cpuid)?;
        let msrs = msrs(kvm, &cpuid, vcpu)?;
        Ok(Self { machine, cpuid, xsave, msrs })
    }

    fn write(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<()> {
        let state = &self.machine.vcpus[0];
        vcpu.set_cpuid2(&self.cpuid)?;
        vcpu.set_mp_state(state.mp_state)?;
        vcpu.set_regs(&state.regs)?;
        kvm::set_sregs2(vcpu, &state.sregs.into())?;
        // SAFETY: the state is of this KVM, as long as it says, and no dynamic feature is on.
        unsafe { vcpu.set_xsave(&self.xsave) }?;
        vcpu.set_xcrs(&state.xcrs)?;
        vcpu.set_debug_regs(&state.debug_regs)?;
        vcpu.set_lapic(&state.lapic)?;
        for msrs in &self.msrs {
            vcpu.set_msrs(msrs)?;
        }
        vcpu.set_vcpu_events(&state.events)?;
        vm.set_pit2(&self.machine.vm.pit)?;
        vm.set_clock(&kvm_clock_data { clock: self.machine.vm.clock.clock, ..Default::default() })?;
        for chip in &self.machine.vm.irqchips {
            vm.set_irqchip(chip)?;
        }
        Ok(())
    }
}

/// Those that can be written back, in as few calls as there can be.
fn msrs(kvm: &Kvm, cpuid: &CpuId, state: &VcpuState) -> Result<Vec<Msrs>> {
    let vm = create(kvm, &Memory::new())?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(cpuid)?;
    let takes = |entry: &kvm_msr_entry| {
        let one = Msrs::from_entries(&[*entry]);
        one.is_ok_and(|one| vcpu.set_msrs(&one).is_ok_and(|set| set == 1))
    };
    let apart = |index| [TSC, TSC_DEADLINE].contains(&index) || WALL_CLOCK.contains(&index);
    let saved = state.msrs.saved.iter().filter(|(index, _)| !apart(*index));
    let entries = saved.map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let entries: Vec<_> = entries.filter(takes).collect();
    Ok(entries.chunks(KVM_MAX_MSR_ENTRIES).map(Msrs::from_entries).collect::<Result<_, _>>()?)
}
