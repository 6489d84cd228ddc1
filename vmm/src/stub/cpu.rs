//! The stub's VM and its one vCPU.
//!
//! In: a mapped file, later RAM. Out: the stub's words, with what it has said. Holds: the vCPU is in ring 3 of long mode from
//! its first instruction, because there are hosts whose KVM emulates ring 0; it has no handlers, so that any exception ends it.

use super::StubError;
use super::image::ImageMapping;
use super::near::{Near, Slot};
use super::staging::Staging;
use super::tables::{Plan, StubMemory, Window};
use super::vectors;
use crate::kvm::{During, Ioctl};
use crate::ram::GuestRam;
use crate::{cpuid, fault, kvm, layout};
use kvm_bindings::{
    KVM_MEM_READONLY, kvm_cpuid_entry2, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use restore_stub::{Vectors, abi};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Selectors as Linux has them: KVM on some hosts knows no others.
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
/// Ring 3's data at 0x28, its 64-bit code at 0x30.
const GDT: [u64; 7] = [0, 0, 0, 0, 0, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
/// SDM volume 3, 3.4.5: code and data segments that have been accessed, a busy TSS, which VMX asks of any guest.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;
/// Bytes of a TSS, and where in it the offset of its I/O bitmap is (SDM volume 3, 8.7 and 20.5.2).
const TSS_LEN: usize = 104;
const TSS_BITMAP: usize = 102;
/// With a bitmap of zeroes, and the byte of ones that must follow it.
const TSS_WHOLE: usize = TSS_LEN + abi::PORTS_END as usize / 8 + 1;
/// PE, MP, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x620;
/// LME, LMA.
const EFER: u64 = 0x500;
/// Bit 1, which is always set, and IOPL 3: ring 3 may use ports. The TSS says so again: there are KVMs that look at the one or
/// the other only (QEMU's SVM, kvm_pvm).
const RFLAGS: u64 = 0x3002;
/// Physical address bits of a processor whose CPUID doesn't say (SDM volume 2, CPUID, leaf 8000_0008H).
const ADDRESS_BITS: u32 = 36;
/// Most bytes of text that are kept of the stub.
const TEXT_MAX: usize = 1024;

const STUB_SLOT: u32 = 0;
const IMAGE_SLOT: u32 = 1;
const RAM_SLOT: u32 = 2;

/// A word through the control port.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) word: u8,
    /// The last line before it.
    pub(super) said: String,
}

/// The VM drops before the memory that it uses; the file is the caller's.
pub(super) struct StubVm<'a> {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: StubMemory,
    image: &'a ImageMapping,
    staging: Staging,
    near: Near,
    text: Vec<u8>,
}

impl<'a> StubVm<'a> {
    /// Ready to run, without RAM. Its vCPU has no wider registers than these.
    pub(super) fn new(kvm: &Kvm, image: &'a ImageMapping, widest: Vectors) -> Result<Self, StubError> {
        let supported = cpuid::supported(kvm)?;
        let plan = Plan::new(image.len(), image.holes().len() as u64);
        check_room(&plan, image.len(), &supported)?;
        let mut memory = StubMemory::new(plan, &GDT)?;
        memory.write(abi::PARAMETERS + 8 * abi::IMAGE_LEN as u64, &image.len().to_le_bytes())?;
        memory.write(abi::PARAMETERS + 8 * abi::HOLES as u64, &plan.holes.to_le_bytes())?;
        memory.write(plan.holes, image.holes())?;
        memory.write(abi::TSS, &task_state())?;
        memory.map(Window { linear: abi::BASE, gpa: plan.base, len: plan.size, writable: true })?;
        memory.map(Window { linear: abi::IMAGE, gpa: plan.image, len: image.len(), writable: false })?;
        let vm = kvm.create_vm().during("KVM_CREATE_VM")?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).during("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(layout::KVM_TSS as usize).during("KVM_SET_TSS_ADDR")?;
        let own = Slot { gpa: plan.base, len: plan.size, host: memory.host_address() };
        add_memslot(&vm, STUB_SLOT, &own, 0)?;
        let file = image.region().map(|(host, len)| Slot { gpa: plan.image, len, host });
        file.iter().try_for_each(|slot| add_memslot(&vm, IMAGE_SLOT, slot, KVM_MEM_READONLY))?;
        let vcpu = vm.create_vcpu(0).during("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&cpuid::to_kvm(&cpuid::for_vcpu(&supported, 0, 1))?).during("KVM_SET_CPUID2")?;
        let (vectors, cr4) = vectors::open(&vcpu, &supported, widest);
        memory.write(abi::BASE, restore_stub::program(vectors))?;
        enter_ring_3(&vcpu, memory.root(), CR4 | cr4)?;
        Ok(Self {
            vcpu,
            vm,
            memory,
            image,
            staging: Staging::new(&plan),
            near: Near::new(kvm::can_pre_fault(kvm), file),
            text: Vec::new(),
        })
    }

    /// Gives the stub a machine's RAM. It has to outlive the VM.
    pub(super) fn give_ram(&mut self, ram: &GuestRam) -> Result<(), StubError> {
        for (slot, region) in (RAM_SLOT..).zip(ram.memory().iter()) {
            let (gpa, len, host) = (region.start_addr().0, region.len(), region.as_ptr() as u64);
            let ram = Slot { gpa, len, host };
            add_memslot(&self.vm, slot, &ram, 0)?;
            self.near.add(ram);
            self.memory.map(Window { linear: abi::RAM + gpa, gpa, len, writable: true })?;
        }
        Ok(())
    }

    pub(super) fn parameter(&self, word: abi::Word) -> u64 {
        self.memory.parameter(word)
    }

    /// Runs the stub until it says a word.
    pub(super) fn run(&mut self) -> Result<Call, StubError> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(abi::SERIAL_PORT, bytes)) => {
                    let room = TEXT_MAX - self.text.len();
                    self.text.extend(bytes.iter().take(room));
                }
                Ok(VcpuExit::IoOut(abi::CONTROL_PORT, [abi::READ_IMAGE])) => self.read_image()?,
                Ok(VcpuExit::IoOut(abi::CONTROL_PORT, [abi::NEAR_RAM])) => self.near_ram(),
                Ok(VcpuExit::IoOut(abi::CONTROL_PORT, [abi::NEAR_NOW])) => self.near.now(&self.vcpu),
                Ok(VcpuExit::IoOut(abi::CONTROL_PORT, [word])) => {
                    let word = *word;
                    return Ok(Call { word, said: last_line(&std::mem::take(&mut self.text)) });
                }
                Ok(VcpuExit::Intr) => {}
                // Newer kernels say it in one way, older ones in the other.
                Ok(VcpuExit::MemoryFault { .. }) => return Err(shortened()),
                Err(error) if error.errno() == libc::EFAULT => return Err(shortened()),
                Ok(_) => return Err(StubError::Failed(fault::report(&mut self.vcpu, |_, _| false))),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(source) => return Err(Ioctl { call: "KVM_RUN", source }.into()),
            }
        }
    }
}

impl StubVm<'_> {
    /// Part of the file.
    fn read_image(&mut self) -> Result<(), StubError> {
        let [start, len] = [abi::NEAR_START, abi::NEAR_LEN].map(|word| self.parameter(word));
        let at = match self.near.image(&self.vcpu, start, len) {
            true => abi::IMAGE + start,
            false => self.staging.copy(self.image, &mut self.memory, start, len)?,
        };
        self.memory.write(abi::PARAMETERS + 8 * abi::IMAGE_AT as u64, &at.to_le_bytes())
    }

    /// Pages of RAM.
    fn near_ram(&mut self) {
        let pages = std::array::from_fn(|word| self.parameter(abi::NEAR_PAGES + word));
        self.near.ram(self.parameter(abi::NEAR_START), pages);
    }
}

/// A page of the file is not there any more, or the disk doesn't give it.
pub(super) fn shortened() -> StubError {
    StubError::Failed("the file was shortened meanwhile, or can't be read".to_owned())
}

fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.lines().next_back().unwrap_or_default().to_owned()
}

/// Refuses a file that would end where this host's processors have no physical addresses.
fn check_room(plan: &Plan, len: u64, supported: &[kvm_cpuid_entry2]) -> Result<(), StubError> {
    let sizes = supported.iter().find(|entry| entry.function == 0x8000_0008);
    let end = 1u64 << sizes.map_or(ADDRESS_BITS, |entry| (entry.eax & 0xff).clamp(32, 52));
    if plan.end <= end {
        return Ok(());
    }
    // Half of what is left above 4 GiB is the file's, half of it RAM's; a GiB is lost to rounding.
    Err(StubError::TooLong { len, max: (end / 2).saturating_sub(3 << 30) })
}

fn add_memslot(vm: &VmFd, slot: u32, what: &Slot, flags: u32) -> Result<(), Ioctl> {
    let memslot = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: what.gpa,
        memory_size: what.len,
        userspace_addr: what.host,
    };
    // SAFETY: `StubVm` holds or borrows the stub's memory and the file, and `overlay` holds the RAM until the VM is dropped.
    unsafe { vm.set_user_memory_region(memslot) }.during("KVM_SET_USER_MEMORY_REGION")
}

fn task_state() -> [u8; TSS_WHOLE] {
    let mut tss = [0; TSS_WHOLE];
    tss[TSS_BITMAP] = TSS_LEN as u8;
    tss[TSS_WHOLE - 1] = 0xff;
    tss
}

const _: () = assert!(abi::TSS + TSS_WHOLE as u64 <= abi::GDT);

fn enter_ring_3(vcpu: &VcpuFd, root: u64, cr4: u64) -> Result<(), Ioctl> {
    let mut sregs: kvm_sregs2 = kvm::get_sregs2(vcpu)?;
    let flat = kvm_segment { limit: !0, present: 1, s: 1, g: 1, dpl: 3, ..Default::default() };
    let data = kvm_segment { selector: USER_DATA, type_: DATA, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: USER_CODE, type_: CODE, l: 1, ..flat };
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: abi::TSS,
        limit: TSS_WHOLE as u32 - 1,
        type_: TSS_BUSY,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable { base: abi::GDT, limit: size_of_val(&GDT) as u16 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, root, cr4, EFER);
    kvm::set_sregs2(vcpu, &sregs)?;
    // As after a call: 8 below a multiple of 16 (System V ABI, 3.2.2).
    let regs = kvm_regs { rip: abi::BASE, rsp: abi::STACK_END - 8, rflags: RFLAGS, ..Default::default() };
    vcpu.set_regs(&regs).during("KVM_SET_REGS")
}
