//! The AMD lane: QEMU's software CPU, which has SVM with nested paging, and `kvm_amd`.
//!
//! In: a kernel, an initramfs, a disk. Out: a running machine whose one channel is QEMU's standard input and output.
//! Holds: QEMU is Debian's 10.0 with its own libraries, whatever this machine has; the kernel's log never mixes with the
//! channel.

use super::image::Wiring;
use super::session::{Emulator, Machine};
use super::{Setup, open_path};
use anyhow::{Context, Result};
use guest_kernels::Packages;
use std::path::Path;
use std::process::{Command, Stdio};

/// Debian 13 has QEMU 10.0. Debian 12's 7.2 crashes a 6.12 kernel that runs `kvm_amd`.
///
/// A fault of 10.0 to know when a guest with several vCPUs crashes: `helper_vmrun` leaves the vector of an interrupt that
/// it injects in `exception_index`, and if that processor's thread is kicked before the next exit (by the monitor's `stop`
/// and `cont`, say, or by a kick that came late), the interrupt is delivered a second time, whatever the guest's interrupt
/// flag. Linux then panics at the first instructions of an interrupt's entry, with user space's GS, and may have no word for it on its console: a 7.2 with
/// two vCPUs was seen to panic so, once in some thirty runs of everything. The lab's own kernel has
/// once died of the like, a 6.12 with guests under way: entry after entry until the stack was full. `death.rs` is about that.
///
/// Another, of 10.0.13, of which the cause is not known: a guest with two vCPUs ends by a triple fault, a 6.12 in one of eight runs of `6.12/live` on an idle
/// machine and hardly ever on a busy one, at a plain boot as well as after a restore; a 7.2 once; no 6.1 ever did. Seen twice in what QEMU logs of interrupts
/// (`-d int`): `VMRUN` injects the timer's interrupt, as it did with the same page tables milliseconds before, and the walk to the IDT (0xfffffe0000000ec0)
/// finds an entry that is not present, by page fault, double fault and triple fault alike, while the other vCPU goes on taking interrupts by the same IDT.
/// One with a single vCPU, `6.12/small-devices`, ended so twice in a row within a second of its restore, and in no other of some twenty runs. 11.1.2 takes a fifth
/// longer for that story and for `6.12/live`; whether it has these faults is not known.
///
/// Guests were seen to hang as well, each once: a 6.1 with one vCPU after its second tick, a 6.12 the second of whose vCPUs ran on and heard no tick any more (its
/// kernel said `rcu_preempt detected stalls`). A 7.2 with two went on ticking, and what ran beside said nothing for four minutes; of the next sixteen runs of
/// `7.2/chain`, by turns with the version before, none did. A processor whose interrupt KVM takes for delivered, and QEMU has dropped, would go so: its local APIC waits
/// for the end of that interrupt for ever. That was not proved: whoever waits in vain tells now what is in service there (`crate::autopsy`). Nor is it known whether these
/// had been restored; in 20 stories of live snapshots and chains, told for the sake of this, none hung.
///
/// Who lost a guest in one of these ways, or waited for one in vain, tries once more, aloud, and but once in a run (`crate::lost`).
const SUITE: &str = "trixie";
/// Memory of the machine in MiB: a guest with 6 GiB fits. The host gives only what is touched.
const MEMORY_MIB: u64 = 8192;
/// The clock of an emulated CPU is no reference, and its mitigations protect nobody.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable";

/// A port is binary-clean; only a console is a terminal.
pub(super) fn wiring(interactive: bool) -> Wiring {
    Wiring {
        channel: if interactive { "/dev/hvc0" } else { "/dev/vport0p1" },
        kernels: "/dev/nvme0n1",
        // NVMe is built into Debian's cloud kernels; virtio is not in each.
        modules: &["virtio_pci", "virtio_console"],
    }
}

pub(super) fn start(setup: &Setup) -> Result<Machine> {
    let mut command = command(setup)?;
    let log = setup.log.try_clone().context("cannot share the lab's log")?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
    let mut emulator = Emulator::start(&mut command)?;
    let output = Box::new(emulator.0.stdout.take().context("QEMU has no output")?);
    let input = Box::new(emulator.0.stdin.take().context("QEMU has no input")?);
    Ok(Machine { emulator, output, input })
}

/// The package tree with QEMU and mke2fs.
pub(super) fn packages() -> Result<Packages> {
    Packages::ensure("lab-qemu", SUITE, &["qemu-system-x86", "e2fsprogs"])
}

fn command(setup: &Setup) -> Result<Command> {
    let packages = packages()?;
    let mut qemu = packages.command("usr/bin/qemu-system-x86_64")?;
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        qemu.arg("-L").arg(packages.path(firmware));
    }
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]);
    qemu.arg("-m").arg(format!("{}M", memory_mib()));
    qemu.arg("-kernel").arg(&setup.kernel.vmlinuz).arg("-initrd").arg(open_path(&setup.initramfs));
    qemu.args(["-append", COMMAND_LINE]);
    qemu.arg("-serial").arg(format!("file:{}", open_path(&setup.log).display()));
    add_channel(&mut qemu, setup.interactive);
    add_disk(&mut qemu, &setup.kernels);
    Ok(qemu)
}

fn add_channel(qemu: &mut Command, interactive: bool) {
    let device = if interactive { "virtconsole" } else { "virtserialport" };
    qemu.args(["-device", "virtio-serial-pci", "-chardev", "stdio,id=channel,signal=off"]);
    qemu.arg("-device").arg(format!("{device},chardev=channel"));
}

fn add_disk(qemu: &mut Command, image: &Path) {
    // In QEMU's option syntax a comma is written twice.
    let file = image.display().to_string().replace(',', ",,");
    qemu.arg("-drive").arg(format!("if=none,id=kernels,format=raw,readonly=on,file={file}"));
    qemu.args(["-device", "nvme,drive=kernels,serial=kernels"]);
}

/// [`MEMORY_MIB`], or on a small host two thirds of its memory.
fn memory_mib() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    memory_for(&meminfo).min(MEMORY_MIB)
}

fn memory_for(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map_or(MEMORY_MIB, |kib| kib / 1024 * 2 / 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_host_keeps_a_third() {
        assert_eq!(memory_for("MemTotal:        6291456 kB\nMemFree: 1 kB\n"), 4096);
        assert_eq!(memory_for("nothing known"), MEMORY_MIB);
    }

    #[test]
    fn a_comma_in_the_cache_path_is_doubled() {
        let mut qemu = Command::new("qemu");
        add_disk(&mut qemu, Path::new("/a,b/image"));
        let args: Vec<_> = qemu.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        assert!(args[1].ends_with("file=/a,,b/image"), "{args:?}");
    }
}
