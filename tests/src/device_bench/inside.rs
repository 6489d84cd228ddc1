//! The bench's part in the lab: guests by turns under both monitors.
//!
//! In: how many rounds, `/extra` with QEMU and an initrd. Out: samples, one a line. Holds: a guest has the machine for itself.

use super::{Monitor, SAMPLE, Sample};
use crate::bridge::{GUEST, HOST, ip};
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const TAP: &str = "tap0";
const MAC: &str = "02:00:00:00:00:07";
const MEMORY_MIB: u32 = 512;
const DISK_BYTES: usize = 256 << 20;
const DISK: &str = "/tmp/disk";
/// Where the lab has the disk with Debian's tools.
const TOOLS: &str = "/lab/disk";
const KERNEL: &str = "/guests/6.12/vmlinux";
const INITRD: &str = "/extra/initrd";
/// iperf3's ports: the guest sends to one, and receives from the other.
const PORTS: [(&str, u16); 2] = [("net-send", 5201), ("net-receive", 5202)];
/// Seconds that each takes, after one to warm up.
const SECONDS: u32 = 4;

/// Runs the rounds and prints their samples.
///
/// # Errors
/// A monitor or a tool fails.
pub fn run(rounds: u32) -> Result<()> {
    fs::write(DISK, vec![7; DISK_BYTES]).context("no room for the disk")?;
    ip(&format!("tuntap add {TAP} mode tap"))?;
    ip(&format!("addr add {HOST}/24 dev {TAP}"))?;
    ip(&format!("link set {TAP} up"))?;
    for round in 1..=rounds {
        for monitor in [Monitor::Vmm, Monitor::Qemu] {
            let samples = session(monitor).with_context(|| format!("round {round}, {monitor:?}"))?;
            for sample in samples {
                println!("{SAMPLE}{}", serde_json::to_string(&sample)?);
            }
        }
    }
    Ok(())
}

/// One guest, from its boot to its end.
fn session(monitor: Monitor) -> Result<Vec<Sample>> {
    let servers = PORTS.map(|(measure, port)| (measure, Server::start(port)));
    let mut vm = match monitor {
        Monitor::Vmm => TestVm::start(&vmm())?,
        Monitor::Qemu => TestVm::start_other(qemu())?,
    };
    let mut samples = Vec::new();
    let mut add = |measure: &str, value| samples.push(Sample { monitor, measure: measure.to_owned(), value });
    let deadline = Instant::now() + LIMIT;
    loop {
        let line = vm.next_line(deadline)?;
        if let Some((_, speed)) = line.split_once("speed ") {
            let (measure, value) = speed.split_once(' ').context("half a line")?;
            add(measure, value.trim().parse()?);
        }
        ensure!(!line.contains("run status="), "the guest ended early: {line}");
        if line.contains("bench done") {
            break;
        }
    }
    drop(vm);
    for (measure, server) in servers {
        add(measure, server?.megabits()?);
    }
    Ok(samples)
}

/// What the guest does.
fn work() -> String {
    let [(_, send), (_, receive)] = PORTS;
    // A server that a slow client left is ready again after a while.
    let client = |rest: String| {
        format!("until iperf3 -c {HOST} -O 1 -t {SECONDS} -p {rest} >/tmp/o; do echo again; sleep 2; done")
    };
    let (send, receive) = (client(send.to_string()), client(format!("{receive} -R")));
    let network = format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up");
    format!("{network}; disk-speed /dev/vda; {send}; {receive}; echo bench done; sleep 99")
}

fn command_line() -> String {
    format!("console=ttyS0 panic=-1 quiet tools=vdb run=\"{}\"", work())
}

fn vmm() -> Vec<String> {
    let memory = format!("{MEMORY_MIB}M");
    let (data, tools) = (format!("path={DISK},id=data"), format!("path={TOOLS},id=tools,readonly=on"));
    let (net, line) = (format!("{TAP},mac={MAC}"), command_line());
    let words = ["run", "--kernel", KERNEL, "--initrd", INITRD, "--memory", &memory, "--cmdline", &line];
    let devices = ["--disk", &data, "--disk", &tools, "--net", &net];
    [&words[..], &devices].concat().into_iter().map(str::to_owned).collect()
}

/// QEMU with the same devices: modern virtio-mmio, ACPI so that Debian's kernels find it, io_uring, the page cache of the
/// host, and the tap without the host's kernel (vhost), which `vmm` doesn't use either.
fn qemu() -> Command {
    let mut qemu = Command::new("/extra/qemu/qemu");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    qemu.args(["-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on", "-accel", "kvm", "-cpu", "host"]);
    qemu.args(["-global", "virtio-mmio.force-legacy=off", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")]);
    qemu.args(["-kernel", KERNEL, "-initrd", INITRD, "-append", &command_line()]);
    let disk = "if=none,format=raw,cache=writeback,discard=unmap,aio=io_uring";
    qemu.args(["-drive", &format!("{disk},id=data,file={DISK}"), "-device", "virtio-blk-device,drive=data"]);
    qemu.args(["-drive", &format!("{disk},id=tools,readonly=on,file={TOOLS}")]);
    qemu.args(["-device", "virtio-blk-device,drive=tools"]);
    qemu.args(["-netdev", &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off")]);
    qemu.args(["-device", &format!("virtio-net-device,netdev=net,mac={MAC}")]);
    qemu
}

/// An iperf3 that waits for clients.
struct Server(Child);

impl Server {
    fn start(port: u16) -> Result<Self> {
        let mut iperf = Command::new("/tools/bin/iperf3");
        iperf.args(["-s", "-J", "--forceflush", "-p", &port.to_string()]).stdout(Stdio::piped());
        Ok(Self(iperf.spawn().context("cannot run iperf3")?))
    }

    /// What arrived at the receiving end, by the report of the last client that stayed to the end.
    fn megabits(mut self) -> Result<f64> {
        self.0.kill()?;
        let output = self.0.stdout.take().context("iperf3 has no output")?;
        let reports = serde_json::Deserializer::from_reader(output).into_iter::<serde_json::Value>();
        let rates = reports.map_while(Result::ok).filter_map(|report| {
            let bits = |end: &str| report["end"][end]["bits_per_second"].as_f64().filter(|&bits| bits > 0.0);
            bits("sum_received").or_else(|| bits("sum_sent"))
        });
        Ok(rates.last().context("iperf3 has no report of a whole test")? / 1e6)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
