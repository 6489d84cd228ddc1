//! What this host's KVM can do, found out by asking it and by trying.
//!
//! In: `/dev/kvm`. Out: a [`Report`] for a person or as JSON, and a verdict on Linux guests in one line. Holds: nothing is
//! believed that can be tried, and each try is bounded in time.

use crate::probes::{Examiner, Finding, PROBES, Probe};
use crate::vm;
use comfy_table::{Table, presets};
use kvm_bindings as kvm_abi;
use kvm_ioctls::Kvm;
use serde::Serialize;
use std::fmt;
use std::fs;
use std::io::{self, Write};

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Why machines can't be made here at all; none if they can.
    pub problem: Option<String>,
    /// None if `/dev/kvm` can't be opened.
    pub kvm: Option<KvmFacts>,
    /// Millions of ring 0 instructions per second; none if it could not be measured.
    pub ring0_mips: Option<f64>,
    /// What KVM says it has.
    pub capabilities: Vec<Capability>,
    /// What was tried.
    pub probes: Vec<Tried>,
    /// Whether Linux guests run.
    pub linux: Verdict,
}

/// KVM itself.
#[derive(Clone, Debug, Serialize)]
pub struct KvmFacts {
    /// Its modules, and how they page: for example `kvm_intel (ept=Y)`.
    pub modules: Vec<String>,
    /// The host's kernel release.
    pub host_kernel: String,
    /// `KVM_GET_API_VERSION`; 12 on every kernel since 2007.
    pub api_version: i32,
    /// The most vCPUs of a VM.
    pub max_vcpus: usize,
    /// The most memory slots of a VM.
    pub max_memslots: usize,
}

/// One capability.
#[derive(Clone, Debug, Serialize)]
pub struct Capability {
    /// Its name in the KVM API, without `KVM_CAP_`.
    pub name: &'static str,
    /// Whether KVM has it.
    pub present: bool,
    /// What is lost without it.
    pub without: &'static str,
}

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// What was tried.
    pub name: &'static str,
    /// Whether it works; none if the host's processor doesn't offer it.
    pub works: Option<bool>,
    /// Why it doesn't.
    pub reason: Option<String>,
    /// What is lost where it doesn't.
    pub without: &'static str,
}

/// Whether Linux guests run.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// They do.
    pub possible: bool,
    /// Why they don't.
    pub reason: Option<String>,
}

/// Slower than this, ring 0 is emulated.
const NATIVE_MIPS: f64 = 10.0;

const NO_MACHINE: &str = "no machine can be made";
const NOT_SAVED: &str = "no machine can be saved whole";

const CAPABILITIES: [(&str, u32, &str); 15] = [
    ("USER_MEMORY", kvm_abi::KVM_CAP_USER_MEMORY, NO_MACHINE),
    ("IRQCHIP", kvm_abi::KVM_CAP_IRQCHIP, NO_MACHINE),
    ("PIT2", kvm_abi::KVM_CAP_PIT2, NO_MACHINE),
    ("IMMEDIATE_EXIT", kvm_abi::KVM_CAP_IMMEDIATE_EXIT, "no machine can be paused without losing an I/O"),
    ("MP_STATE", kvm_abi::KVM_CAP_MP_STATE, NOT_SAVED),
    ("VCPU_EVENTS", kvm_abi::KVM_CAP_VCPU_EVENTS, NOT_SAVED),
    ("SREGS2", kvm_abi::KVM_CAP_SREGS2, NOT_SAVED),
    ("XSAVE2", kvm_abi::KVM_CAP_XSAVE2, NOT_SAVED),
    ("XCRS", kvm_abi::KVM_CAP_XCRS, NOT_SAVED),
    ("DEBUGREGS", kvm_abi::KVM_CAP_DEBUGREGS, NOT_SAVED),
    ("PIT_STATE2", kvm_abi::KVM_CAP_PIT_STATE2, NOT_SAVED),
    ("ADJUST_CLOCK", kvm_abi::KVM_CAP_ADJUST_CLOCK, "kvmclock jumps in restored guests"),
    ("KVMCLOCK_CTRL", kvm_abi::KVM_CAP_KVMCLOCK_CTRL, "guests report soft lockups after a pause"),
    ("TSC_DEADLINE_TIMER", kvm_abi::KVM_CAP_TSC_DEADLINE_TIMER, "guests use the slower LAPIC counter"),
    (
        "TSC_CONTROL",
        kvm_abi::KVM_CAP_TSC_CONTROL,
        "guests restored on a host of another TSC frequency see time run wrong",
    ),
];

/// Whether this host's KVM runs Linux guests; takes a fraction of a second.
///
/// # Errors
/// It doesn't, and why, in one line that says what else to do.
pub fn can_run_linux() -> Result<(), String> {
    let kvm = vm::open().map_err(|e| e.to_string())?;
    match first_obstacle(&kvm) {
        Some(obstacle) => Err(format!(
            "{} cannot run Linux guests ({obstacle}): use the lab (make lab RUN='…'), or --force to try anyway; see \
             `vmm doctor`",
            modules().first().map_or("this host's KVM", String::as_str)
        )),
        None => Ok(()),
    }
}

fn first_obstacle(kvm: &Kvm) -> Option<String> {
    let mut examiner = match Examiner::new(kvm) {
        Ok(examiner) => examiner,
        Err(e) => return Some(e.to_string()),
    };
    PROBES.iter().filter(|probe| probe.linux_needs_it).find_map(|probe| match examiner.ask(probe) {
        Finding::Fails(reason) => Some(format!("{}: {reason}", probe.name)),
        Finding::Works | Finding::NotOffered => None,
    })
}

/// Examines this host and prints what was found: tables for a person, or JSON.
///
/// # Errors
/// The output can't be written.
pub fn run(json: bool, out: &mut dyn Write) -> io::Result<()> {
    let report = examine();
    if json { writeln!(out, "{}", serde_json::to_string_pretty(&report)?) } else { writeln!(out, "{report}") }
}

/// Examines this host.
pub fn examine() -> Report {
    let kvm = Kvm::new().ok();
    let (mut examiner, problem) = match examiner(kvm.as_ref()) {
        Ok(examiner) => (examiner, None),
        Err(problem) => (None, Some(problem)),
    };
    let ring0_mips = examiner.as_mut().and_then(|examiner| examiner.ring0_mips().ok());
    let probes = examiner.as_mut().map(tried_all).unwrap_or_default();
    let linux = verdict(problem.as_deref(), &probes);
    let capabilities = kvm.as_ref().map(capabilities).unwrap_or_default();
    Report { problem, kvm: kvm.as_ref().map(facts), ring0_mips, capabilities, probes, linux }
}

/// [`vm::open`] says why there is no KVM, or too old a one.
fn examiner(kvm: Option<&Kvm>) -> Result<Option<Examiner<'_>>, String> {
    vm::open().map_err(|e| e.to_string())?;
    kvm.map(|kvm| Examiner::new(kvm).map_err(|e| e.to_string())).transpose()
}

fn facts(kvm: &Kvm) -> KvmFacts {
    KvmFacts {
        modules: modules(),
        host_kernel: first_line("/proc/sys/kernel/osrelease").unwrap_or_default(),
        api_version: kvm.get_api_version(),
        max_vcpus: kvm.get_max_vcpus(),
        max_memslots: kvm.get_nr_memslots(),
    }
}

fn capabilities(kvm: &Kvm) -> Vec<Capability> {
    let ask = |number: u32| kvm.check_extension_raw(u64::from(number)) > 0;
    CAPABILITIES
        .iter()
        .map(|&(name, number, without)| Capability { name, present: ask(number), without })
        .collect()
}

fn tried_all(examiner: &mut Examiner<'_>) -> Vec<Tried> {
    PROBES.iter().map(|probe| tried(probe, examiner.ask(probe))).collect()
}

fn tried(probe: &Probe, finding: Finding) -> Tried {
    let (works, reason) = match finding {
        Finding::Works => (Some(true), None),
        Finding::NotOffered => (None, None),
        Finding::Fails(reason) => (Some(false), Some(reason)),
    };
    Tried { name: probe.name, works, reason, without: probe.without }
}

fn verdict(problem: Option<&str>, probes: &[Tried]) -> Verdict {
    let needed = |name| PROBES.iter().any(|probe| probe.name == name && probe.linux_needs_it);
    let failed: Vec<&str> =
        probes.iter().filter(|t| t.works == Some(false) && needed(t.name)).map(|t| t.name).collect();
    let reason = match problem {
        Some(problem) => Some(problem.to_owned()),
        None if failed.is_empty() => None,
        None => Some(format!("this KVM fails at: {}", failed.join("; "))),
    };
    Verdict { possible: reason.is_none(), reason }
}

/// The KVM modules that are loaded or built in, with their most telling parameter.
fn modules() -> Vec<String> {
    let describe = |(module, parameter): (&str, &str)| {
        let directory = format!("/sys/module/{module}");
        fs::metadata(&directory).ok()?;
        let value = first_line(&format!("{directory}/parameters/{parameter}"));
        Some(value.map_or(module.to_owned(), |value| format!("{module} ({parameter}={value})")))
    };
    [("kvm_intel", "ept"), ("kvm_amd", "npt"), ("kvm_pvm", "")].into_iter().filter_map(describe).collect()
}

fn first_line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()?.lines().next().map(str::to_owned)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(kvm) = &self.kvm {
            writeln!(f, "{kvm}")?;
            writeln!(f, "ring 0    {}\n", self.ring0())?;
            writeln!(f, "{}\n", capability_table(&self.capabilities).trim_fmt())?;
        }
        if !self.probes.is_empty() {
            writeln!(f, "{}\n", probe_table(&self.probes).trim_fmt())?;
        }
        match &self.linux.reason {
            None => write!(f, "Linux guests: yes"),
            Some(reason) => write!(f, "Linux guests: no, because {reason}"),
        }
    }
}

impl fmt::Display for KvmFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "KVM       {}, API version {}", self.modules.join(", "), self.api_version)?;
        writeln!(f, "host      Linux {}", self.host_kernel)?;
        write!(f, "limits    {} vCPUs and {} memory slots in a VM", self.max_vcpus, self.max_memslots)
    }
}

impl Report {
    fn ring0(&self) -> String {
        match self.ring0_mips {
            None => "could not be measured".into(),
            Some(mips) if mips < NATIVE_MIPS => {
                format!("emulated: {mips:.1} million instructions per second")
            }
            Some(mips) => format!("native: {mips:.1} million instructions per second"),
        }
    }
}

fn capability_table(capabilities: &[Capability]) -> Table {
    let mut table = table(["capability", "", "without it"]);
    for capability in capabilities {
        let (present, without) = if capability.present { ("yes", "") } else { ("no", capability.without) };
        table.add_row([capability.name, present, without]);
    }
    table
}

fn probe_table(probes: &[Tried]) -> Table {
    let mut table = table(["tried", "works", "why not", "so"]);
    for tried in probes {
        let (works, so) = match tried.works {
            Some(true) => ("yes", ""),
            Some(false) => ("no", tried.without),
            None => ("-", "not offered to guests"),
        };
        table.add_row([tried.name, works, tried.reason.as_deref().unwrap_or(""), so]);
    }
    table
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

#[cfg(test)]
mod tests;
