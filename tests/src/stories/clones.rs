//! A story of two machines from one snapshot, which run at the same time and share nothing. It needs the lab.

use super::disks::{ext4, run};
use super::vmm_with;
use crate::bridge::{Namespace, ping};
use crate::guests::Guest;
use crate::vm::{TestVm, program};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest runs: a disk, and a network where the host is always at the same address.
pub const GET_READY: &str = "mount -t ext4 /dev/vda /root; echo before > /root/story; sync; \
     ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; echo net ready";
/// What a kernel says that knows of VMGenID.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// One of the clones, and what it has of the host.
struct Clone<'a> {
    name: &'static str,
    vm: TestVm,
    network: &'a Namespace,
    tap: &'static str,
    disk: PathBuf,
    vsock: PathBuf,
}

/// Two machines run from one snapshot at the same time. Each has a disk, a tap and a vsock path of its own, and random
/// numbers too: by itself where the kernel knows of VMGenID (`forks` says so), otherwise once its agent has it reseed.
///
/// # Errors
/// Something of one is seen in the other, or it doesn't go on.
pub fn clones(guest: Guest, forks: bool, dir: &Path) -> Result<()> {
    let (file, disk, vsock) = (dir.join("snapshot"), dir.join("disk"), dir.join("vsock"));
    ext4(&disk, "")?;
    let guest = guest
        .argument("--disk", &format!("path={},id=data", disk.display()))
        .argument("--net", "tap0")
        .argument("--vsock", &vsock.display().to_string());
    let here = Namespace::new("here", "tap0")?;
    let there = Namespace::new("there", "tap7")?;
    let mut vm = start_in(&here, &guest.run_args())?;
    vm.wait_for("net ready")?;
    ping(here.command("ping"))?;
    vm.snapshot_with(&file, "stop", &["--with-disks"])?;
    ensure!(vm.wait()? == 0, "after its snapshot vmm ended with another status than 0");

    let mut twins = [
        Clone::start("one", (&here, "tap0"), &file, dir)?,
        Clone::start("two", (&there, "tap7"), &file, dir)?,
    ];
    for twin in &mut twins {
        twin.vm.wait_for(if forks { RESEEDED } else { guest.pulse })?;
    }
    draw_apart(&twins, forks)?;
    for round in 1..=3 {
        twins.iter_mut().try_for_each(|twin| twin.lives_alone(&guest, round))?;
    }
    twins.into_iter().try_for_each(|twin| twin.end())?;
    ensure!(held(&disk)? == "before\n", "a clone wrote to the disk that both come from");
    Ok(())
}

/// Without VMGenID nothing tells the guest that there are two of it; what it draws then is printed, not judged.
fn draw_apart(twins: &[Clone; 2], forks: bool) -> Result<()> {
    let draw = || -> Result<[String; 2]> { Ok([twins[0].draw()?, twins[1].draw()?]) };
    let [one, two] = draw()?;
    println!("  random numbers: {} {}", one.trim(), two.trim());
    if !forks {
        for twin in twins {
            run(&mut vmm_with(["agent", "reseed", "--vsock", twin.vsock.to_str().context("path")?]))?;
        }
    }
    let ([three, four], both) = (draw()?, |one, two| format!("both drew {one} {two}"));
    ensure!(!forks || one != two, both(one, two));
    ensure!(three != four, both(three, four));
    Ok(())
}

impl<'a> Clone<'a> {
    fn start(
        name: &'static str,
        (network, tap): (&'a Namespace, &'static str),
        file: &Path,
        dir: &Path,
    ) -> Result<Self> {
        let (disk, vsock) = (dir.join(name), dir.join(format!("{name}.vsock")));
        let (data, net) = (format!("data={}", disk.display()), format!("net0={tap}"));
        let (file, path) = (file.display().to_string(), vsock.display().to_string());
        let words = ["restore", &file, "--disk", &data, "--net", &net, "--vsock", &path];
        let vm = start_in(network, &words.map(str::to_owned))?;
        Ok(Self { name, vm, network, tap, disk, vsock })
    }

    /// What it writes to its disk is there with what it wrote before, and nothing else; its tap and its socket are its own.
    fn lives_alone(&mut self, guest: &Guest, round: usize) -> Result<()> {
        self.vm.wait_for(guest.pulse)?;
        ping(self.network.command("ping"))?;
        let told = self.exec(&format!("echo {} >> /root/story; sync; cat /root/story", self.name))?;
        let expected = format!("before\n{}", format!("{}\n", self.name).repeat(round));
        ensure!(told == expected, "{}: {told:?} on its disk", self.name);
        let status = self.vm.ask("status", &[])?;
        let (tap, vsock) = (&status["networks"][0]["tap"], &status["vsock"]);
        ensure!(
            *tap == self.tap && *vsock == self.vsock.to_str().context("path")?,
            "{}: {status}",
            self.name
        );
        Ok(())
    }

    fn draw(&self) -> Result<String> {
        self.exec("head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '")
    }

    /// What a command in the guest prints.
    fn exec(&self, command: &str) -> Result<String> {
        let vsock = self.vsock.to_str().context("path")?;
        run(&mut vmm_with(["exec", "--vsock", vsock, "--", "sh", "-c", command]))
    }

    fn end(mut self) -> Result<()> {
        self.vm.ask("stop", &[])?;
        self.vm.wait()?;
        let story = held(&self.disk)?;
        ensure!(story == format!("before\n{0}\n{0}\n{0}\n", self.name), "{}: {story:?}", self.name);
        Ok(())
    }
}

/// What a disk says of its machine. Its journal is replayed first, as after a power cut.
fn held(disk: &Path) -> Result<String> {
    // It ends with 1 if there was something to replay.
    let _ = Command::new("/tools/bin/e2fsck").arg("-p").arg(disk).output()?;
    run(Command::new("/tools/bin/debugfs").args(["-R", "cat /story"]).arg(disk))
}

fn start_in(network: &Namespace, args: &[String]) -> Result<TestVm> {
    let mut command = network.command(program().to_str().context("path")?);
    command.args(args);
    TestVm::start_as(command)
}
