//! All of a snapshot but its RAM.
//!
//! In: a machine's state, its disks' records. Out: sections, a manifest's facts, a debugger's registers. Holds: what a host must offer is read off
//! the state itself.

use super::{
    BOARD, DISKS, NEED_TSC, NEED_VENDOR, NEED_XSAVE, SECTION_VERSION, SHAPE, SavedRam, VM, VOUCHER,
    vcpu_section,
};
use crate::capture::MachineState;
use crate::disk::DiskRecord;
use crate::vcpu_state::VcpuState;
use crate::voucher::Voucher;
use crate::{cpuid, kernel};
use snapshot::{
    About, Contents, GenerationId, GuestKernel, HostNeed, NeedValue, Registers, Section, SectionError,
};
use std::time::SystemTime;

/// What every machine has.
const DEVICES: [&str; 7] =
    ["COM1", "i8042", "RTC", "ACPI registers", "panic device", "VM generation id", "exit port"];

/// All of a snapshot but its RAM.
pub(super) struct Notes {
    pub(super) about: About,
    pub(super) vcpus: Vec<Registers>,
    pub(super) vmcoreinfo: Option<Vec<u8>>,
    pub(super) sections: Vec<Section>,
}

impl Notes {
    pub(super) fn new(
        state: &MachineState,
        records: &[DiskRecord],
        generation: GenerationId,
        vmcoreinfo: Option<Vec<u8>>,
    ) -> Result<Self, SectionError> {
        let mut sections = sections(state)?;
        sections.push(Section::encode(DISKS, SECTION_VERSION, &records)?);
        if let Some(voucher) = Voucher::give(&state.vcpus) {
            sections.push(Section::encode(VOUCHER, SECTION_VERSION, &voucher)?);
        }
        let vcpus = state.vcpus.iter().map(debugger_registers).collect();
        Ok(Self { about: about(state, generation), vcpus, vmcoreinfo, sections })
    }

    pub(super) fn contents<'a>(&'a self, ram: &'a SavedRam) -> Contents<'a> {
        let vmcoreinfo = self.vmcoreinfo.as_deref();
        Contents {
            about: self.about.clone(),
            vcpus: &self.vcpus,
            vmcoreinfo,
            sections: &self.sections,
            ram,
            delta: None,
        }
    }
}

fn sections(state: &MachineState) -> Result<Vec<Section>, SectionError> {
    let mut sections = vec![
        Section::encode(SHAPE, SECTION_VERSION, &state.shape)?,
        Section::encode(VM, SECTION_VERSION, &state.vm)?,
        Section::encode(BOARD, SECTION_VERSION, &state.board)?,
    ];
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        sections.push(Section::encode(&vcpu_section(index), SECTION_VERSION, vcpu)?);
    }
    Ok(sections)
}

fn about(state: &MachineState, generation: GenerationId) -> About {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let version = state.shape.kernel.version.clone();
    About {
        generation,
        created_unix_ns: now.as_nanos() as u64,
        writer: concat!("vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        kernel: GuestKernel {
            release: version.as_deref().map(|version| kernel::release(version).to_owned()),
            version,
            build_id: state.shape.kernel.build_id.clone(),
        },
        host_needs: host_needs(&state.vcpus[0]),
        devices: device_names(state),
    }
}

fn device_names(state: &MachineState) -> Vec<String> {
    let fixed = DEVICES.map(str::to_owned);
    let virtio = state.board.virtio.iter().map(|slot| format!("{} `{}`", slot.device.kind(), slot.id));
    fixed.into_iter().chain(virtio).collect()
}

fn host_needs(vcpu: &VcpuState) -> Vec<HostNeed> {
    let text = |name: &str, value: String| HostNeed { name: name.to_owned(), value: NeedValue::Text(value) };
    let number = |name: &str, value| HostNeed { name: name.to_owned(), value: NeedValue::Number(value) };
    let mut needs =
        vec![text(NEED_VENDOR, cpuid::vendor(&vcpu.cpuid)), number(NEED_XSAVE, vcpu.xsave.len() as u64)];
    needs.extend(vcpu.tsc_khz.map(|khz| number(NEED_TSC, u64::from(khz))));
    needs
}

/// What a debugger shows of a vCPU.
pub(super) fn debugger_registers(vcpu: &VcpuState) -> Registers {
    let r = &vcpu.regs;
    let [cs, ds, es, fs, gs, ss, ..] = vcpu.sregs.segments;
    Registers {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rbp: r.rbp,
        rsp: r.rsp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
        cs: cs.selector,
        ds: ds.selector,
        es: es.selector,
        fs: fs.selector,
        gs: gs.selector,
        ss: ss.selector,
        fs_base: fs.base,
        gs_base: gs.base,
    }
}
