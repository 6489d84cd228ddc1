//! Stock Linux guests, in both lanes of the lab.

use anyhow::{Context, Result, ensure};
use std::io::{self, Write};
use std::time::Duration;
use vmm_tests::lab::{Lab, Lane};

/// Runs stories in a lab and passes on what they say.
fn tell(lab: Lab, stories: &[&str]) -> Result<()> {
    let extra = tempfile::tempdir()?;
    let program = extra.path().join("stories");
    std::fs::copy(env!("CARGO_BIN_EXE_stories"), program).context("cannot copy the stories")?;
    let mut told = Told::default();
    let status =
        lab.extra(extra.path()).stream(&format!("/extra/stories {}", stories.join(" ")), &mut told)?;
    let told = String::from_utf8_lossy(&told.0);
    // A lab that is started once more tells what it had told before.
    let last = told.lines().rfind(|line| line.starts_with("stories: ")).context("no summary")?;
    let passed = last.strip_prefix("stories: ").and_then(|rest| rest.strip_suffix(" passed, 0 failed"));
    let passed: usize = passed.with_context(|| last.to_owned())?.parse()?;
    ensure!(status == 0 && passed >= stories.len(), "status {status}, {last}");
    ensure!(told.matches("... ok").count() >= passed, "{last}, and fewer are told");
    Ok(())
}

/// What the stories say, kept and passed on as it comes.
#[derive(Default)]
struct Told(Vec<u8>);

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        print!("{}", String::from_utf8_lossy(bytes));
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

fn amd() -> Lab {
    Lab::new().lane(Lane::Amd).limit(Duration::from_secs(900))
}

#[test]
fn amd_6_1() -> Result<()> {
    tell(amd(), &["6.1/restart", "6.1/panic-dump", "6.1/oracle-2", "6.1/typing", "6.1/expect-kernel"])
}

#[test]
fn amd_6_12() -> Result<()> {
    tell(
        amd(),
        &["6.12/restart", "6.12/reboot", "6.12/dump", "6.12/exit-port", "6.12/oracle-4", "6.12/by-stub"],
    )
}

#[test]
fn amd_7_2() -> Result<()> {
    tell(amd(), &["7.2/restart", "7.2/panic-dump-without-driver", "7.2/oracle-2", "7.2/above-4g"])
}

/// Pauses of a second, a minute and a day; two machines from one snapshot. `make torture` has the pauses with each kernel.
#[test]
fn amd_time() -> Result<()> {
    tell(amd(), &["6.1/time-2", "6.12/time-tsc", "7.2/twins-2"])
}

/// Guests whose wall clock is set after a restore: by their agent, or by themselves. `make torture` has both with each kernel.
#[test]
fn amd_wall_clock() -> Result<()> {
    tell(amd(), &["6.1/clock-by-agent", "6.12/clock-without-agent"])
}

/// `make torture` has it with each kernel.
#[test]
fn amd_networks() -> Result<()> {
    tell(amd(), &["6.1/network", "7.2/network"])
}

#[test]
fn amd_networks_of_clones() -> Result<()> {
    tell(amd(), &["6.12/clones", "6.12/network-oracle", "7.2/network-fd", "7.2/network-taps"])
}

/// Sockets between guest and host, and the guest's agent; a sample, of which `make torture` goes through all.
#[test]
fn amd_sockets() -> Result<()> {
    tell(amd(), &["6.1/agent", "6.12/sockets", "6.12/oracle-vsock", "7.2/socket-clones"])
}

/// Ten switches between three kernels that sleep in memory (in files: `make torture`); entropy, balloon, console, which `make torture` has with
/// each kernel.
#[test]
fn amd_switch_and_small_devices() -> Result<()> {
    tell(amd(), &["switch", "7.2/small-devices"])
}

/// A kernel writes another to a disk from its `/proc/vmcore`, or ends before it has; the rest is in `make torture`.
#[test]
fn amd_image_kernels() -> Result<()> {
    tell(amd(), &["6.1/suspended-poweroff", "7.2/suspended-stub", "6.12/suspended-ends"])
}

/// A sample; `make torture` goes through 100. And snapshots of a guest that runs on, there with each kernel, here not with the one that the lab's
/// processor loses when it has two vCPUs (`lab::qemu` tells how).
#[test]
fn amd_20_rounds_and_live() -> Result<()> {
    tell(amd(), &["6.12/rounds-20-cpus-1", "6.1/live", "7.2/chain"])
}

/// A sample; `make torture` goes through 50 with each kernel, and every power cut.
#[test]
fn amd_disks() -> Result<()> {
    tell(amd(), &["6.12/disk-commits-5", "6.12/disk-hangs", "6.1/disk-kept", "power-cuts-60"])
}

/// The oracle with every device there is; `make torture` has it with each kernel.
#[test]
fn amd_every_device() -> Result<()> {
    tell(amd(), &["6.1/oracle-every-device", "7.2/oracle-every-device"])
}

/// Kernels are put under live processes, or not; and processes go to another machine, as a file.
#[test]
fn amd_carried() -> Result<()> {
    tell(amd(), &["upgrade-or-not", "moved"])
}

#[test]
fn amd_our_own_guests_on_an_older_host() -> Result<()> {
    tell(amd().host("6.1"), &["bare"])
}

#[test]
fn amd_shadow_paging() -> Result<()> {
    tell(amd().kvm_args("npt=0"), &["bare"])
}

fn intel() -> Lab {
    Lab::new().lane(Lane::Intel).limit(Duration::from_secs(900))
}

#[test]
fn intel_6_1() -> Result<()> {
    tell(intel(), &["bare", "6.1/restart", "6.1/oracle-2", "6.1/by-stub"])
}

#[test]
fn intel_shadow_paging() -> Result<()> {
    tell(intel().kvm_args("ept=0"), &["6.1/restart"])
}
