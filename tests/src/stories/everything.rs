//! The story of a machine with every device there is, all of them at work.

use super::disks::{WORK, check_disk, wait_for_commits, worker_with};
use super::incremental::is_all;
use super::keeping::captured_again;
use crate::bridge::{Bridge, ping};
use crate::guests::Guest;
use crate::vm::{TestVm, program, until};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;
use vmm::board::BoardState;
use vmm::load;
use vmm::virtio::DeviceState;

/// Runs in the guest before the disk's own work: a clock that is years ahead, frames, random bytes, a second console.
const BESIDES: &str = r#"
date -u -s 2031-05-06
hwclock -u -w
ip addr add 10.0.0.2/24 dev eth0
ip link set eth0 up
ping -A -q 10.0.0.1 >/dev/null &
(while sleep 0.05; do dd if=/dev/hwrng of=/dev/null bs=512 count=1 2>/dev/null; done) &
(while sleep 0.2; do echo hvc0 works; done >/dev/hvc0) &
"#;
/// Printed on hvc0.
const SECOND_CONSOLE: &str = "hvc0 works";
/// How much the guest gives up.
const BALLOON: &str = "64M";
/// Two disks, network, sockets, random bytes, balloon, console.
const DEVICES: usize = 7;

/// The oracle with every device at work: a restored machine that is captured before it runs is the machine that was saved,
/// device by device. What was captured then goes on, with every device.
///
/// # Errors
/// Names the device that differs, or does not work.
pub fn every_device(guest: Guest, dir: &Path) -> Result<()> {
    let _bridge = Bridge::new("br0", &["tap0"])?;
    let (disk, socket) = (dir.join("disk"), dir.join("vsock"));
    let guest = worker_with(guest, &disk, &format!("{BESIDES}{WORK}"))?;
    let guest = guest.argument("--net", "tap0").argument("--vsock", &socket.display().to_string());
    let guest = guest.argument("--console", "virtio");
    let args = [guest.run_args(), vec!["--rng".to_owned(), "--balloon".to_owned()]].concat();

    let mut vm = TestVm::start(&args)?;
    works(&mut vm, &socket)?;
    vm.ask("balloon", &[BALLOON])?;
    until("pages that the guest gives up", || Ok((given_up(&vm)? > 0).then_some(())))?;
    let [tracked, since] = ["tracked", "since"].map(|name| dir.join(name));
    vm.ask("snapshot", &["--track", tracked.to_str().context("path")?])?;
    works(&mut vm, &socket).context("watched")?;
    is_all(&vm, (&tracked, &since), dir).context("what all of the devices have written")?;
    let second = captured_again(vm, dir)?;
    all_at_work(&load::state(&load::open(&second)?)?.board)?;

    let mut vm = TestVm::restore(&second)?;
    works(&mut vm, &socket).context("after the restore")?;
    vm.ask("balloon", &["0"])?;
    until("pages that the guest takes back", || Ok((given_up(&vm)? == 0).then_some(())))?;
    vm.ask("stop", &[])?;
    vm.wait()?;
    check_disk(&disk, dir).map(drop)
}

/// What can be seen from outside of each device at work.
fn works(vm: &mut TestVm, socket: &Path) -> Result<()> {
    wait_for_commits(vm, 2)?;
    vm.wait_for(SECOND_CONSOLE)?;
    ping(Command::new("ping"))?;
    let year = Command::new(program())
        .args(["exec", "--vsock"])
        .arg(socket)
        .args(["--", "hwclock", "-u", "-r"])
        .output()?;
    ensure!(String::from_utf8_lossy(&year.stdout).contains("2031"), "the RTC says: {year:?}");
    wait_for_commits(vm, 1)
}

fn given_up(vm: &TestVm) -> Result<u64> {
    vm.ask("status", &[])?["balloon"]["actual_bytes"].as_u64().context("no balloon in the status")
}

/// That there are all the devices, that the guest's drivers use them, and that each has something to remember.
fn all_at_work(board: &BoardState) -> Result<()> {
    ensure!(board.virtio.len() == DEVICES, "{} virtio devices", board.virtio.len());
    ensure!(board.rtc.offset != 0, "nobody has set the RTC");
    for slot in &board.virtio {
        let registers = match &slot.device {
            DeviceState::Rng(state) => &state.registers,
            DeviceState::Balloon(state) => {
                ensure!(state.device.actual > 0 && state.device.target > 0, "nothing in the balloon");
                &state.registers
            }
            DeviceState::Console(state) => &state.registers,
            DeviceState::Vsock { state, .. } => &state.registers,
            DeviceState::Blk(state) => &state.registers,
            DeviceState::Net { state, .. } => &state.registers,
        };
        let used = registers
            .as_ref()
            .map_or(0, |registers| registers.queues.iter().filter(|q| q.next_avail > 0).count());
        ensure!(used > 0, "nobody uses {} `{}`", slot.device.kind(), slot.id);
    }
    Ok(())
}
