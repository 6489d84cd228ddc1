//! Autopsy: what the processors of a guest are at that was waited for in vain.
//!
//! In: the control socket of a VM. Out: a line for each vCPU, as it is now and as it is a while later. Holds: the VM goes on; whoever asks has
//! failed already, so that what can't be told is said in its place.

use crate::vm::{ends_within, program};
use anyhow::{Context, Result, ensure};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use vmm::vcpu_state::VcpuState;
use vmm::{load, msr};

const A_WHILE: Duration = Duration::from_secs(2);
/// A monitor that takes longer to save it hangs itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// Registers of the local APIC's page (Intel SDM 3A, table 13-1).
const TASK_PRIORITY: usize = 0x80;
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
const TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;

/// The vCPUs of the VM with this control socket.
pub fn of(socket: &Path) -> String {
    twice(socket).unwrap_or_else(|error| format!("of its vCPUs nothing can be told: {error:#}"))
}

fn twice(socket: &Path) -> Result<String> {
    UnixStream::connect(socket).context("no control socket")?;
    let now = vcpus(socket)?;
    std::thread::sleep(A_WHILE);
    let later = vcpus(socket)?;
    let lines = now.iter().zip(&later).enumerate();
    Ok(lines.map(|(at, (now, later))| format!("vCPU {at} now: {now}\nvCPU {at} later: {later}\n")).collect())
}

/// A line for each.
fn vcpus(socket: &Path) -> Result<Vec<String>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("snapshot");
    let mut saving = Command::new(program())
        .args(["snapshot", "--then", "resume", "--api"])
        .args([socket, &file])
        .stdout(Stdio::null())
        .spawn()?;
    if !ends_within(&mut saving, PATIENCE)? {
        saving.kill()?;
    }
    ensure!(saving.wait()?.success(), "it can't be saved");
    Ok(load::state(&load::open(&file)?)?.vcpus.iter().map(line).collect())
}

fn line(vcpu: &VcpuState) -> String {
    let (regs, events, page) = (&vcpu.regs, &vcpu.events, &vcpu.lapic.regs);
    let [tpr, timer, initial, current] =
        [TASK_PRIORITY, TIMER, INITIAL_COUNT, CURRENT_COUNT].map(|at| register(page, at));
    let deadline = vcpu.msrs.get(msr::TSC_DEADLINE).unwrap_or_default();
    let (in_service, requested) = (vectors(page, IN_SERVICE), vectors(page, REQUESTED));
    let (injected, vector) = (events.interrupt.injected, events.interrupt.nr);
    format!(
        "rip {:#x} rflags {:#x} rsp {:#x} gs {:#x} mp_state {} tsc {:#x} deadline {deadline:#x} timer {timer:#x} of {initial:#x} left {current:#x} \
         tpr {tpr:#x} in service {in_service:x?} requested {requested:x?} injected {injected} {vector:#x} exception {} {:#x} nmi {} {} shadow {}",
        regs.rip,
        regs.rflags,
        regs.rsp,
        vcpu.sregs.segments[4].base,
        vcpu.mp_state.mp_state,
        vcpu.tsc,
        events.exception.injected,
        events.exception.nr,
        events.nmi.injected,
        events.nmi.masked,
        events.interrupt.shadow,
    )
}

fn register(page: &[i8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| page[at + byte].cast_unsigned()))
}

/// The vectors of a register of 256 bits, which are in eight words, 16 bytes apart.
fn vectors(page: &[i8], first: usize) -> Vec<usize> {
    let is_set = |vector: &usize| register(page, first + vector / 32 * 16) >> (vector % 32) & 1 != 0;
    (0..256).filter(is_set).collect()
}

#[cfg(test)]
mod tests {
    use super::{IN_SERVICE, vectors};

    #[test]
    fn a_vector_is_found_in_its_word() {
        let mut page = [0; 1024];
        page[IN_SERVICE + 7 * 16 + 1] = 0b0001_0000;
        page[IN_SERVICE + 16] = 1;
        assert_eq!(vectors(&page, IN_SERVICE), [32, 236]);
    }
}
