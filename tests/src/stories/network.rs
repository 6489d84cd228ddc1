//! Stories of guests on a network. They need root and a host with taps, such as the lab.

use super::host_clock::HostClock;
use super::time::wall_lag;
use super::{capture_again, refused, vmm_with};
use crate::bridge::{Bridge, GUEST, HOST, Watch, open_tap, ping};
use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm, until};
use anyhow::{Context, Result, ensure};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The guest's address on the wire, unless the story gives another.
const MAC: &str = "02:00:00:00:00:07";
/// Where the host listens for the guest.
const PORT: u16 = 9000;
/// Bytes of the long file that the guest serves.
const LONG: usize = 8 << 20;

/// What a guest runs that serves files, and tells the host of itself over a connection of its own, again when that ends.
pub const SERVE: &str = "mkdir /www; cp /proc/sys/kernel/random/boot_id /www/; yes 0123456 | head -c 8388608 > /www/long; \
     ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; httpd -h /www; witness clocks & echo net ready; \
     while :; do (while sleep 0.2; do echo beat; done) | nc 10.0.0.1 9000; echo net lost; sleep 0.2; done";

/// What a guest runs that is always in the middle of something.
pub const BUSY: &str = "ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; ping -A -q 10.0.0.1";

/// How long the guest is in its file.
#[derive(Clone, Copy, Debug)]
pub enum Gap {
    /// For seconds that are made up: the host's wall clock is set.
    MadeUp(i64),
    /// For real seconds.
    Real(u64),
}

impl Gap {
    /// Lets the time pass. The clock is off for as long as the value lives.
    fn pass(self) -> Result<HostClock> {
        let mut clock = HostClock::of_the_lab()?;
        match self {
            Self::MadeUp(seconds) => clock.shift(seconds)?,
            Self::Real(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
        }
        Ok(clock)
    }
}

/// A guest pings and serves TCP, is kept, and goes on at another tap: its neighbours are told, a connection whose other end is
/// gone is reset, new ones work in both directions, what it sends arrives whole, and its wall clock is right.
///
/// # Errors
/// Tells what does not.
pub fn on_the_network(guest: &Guest, gap: Gap, dir: &Path) -> Result<()> {
    let bridge = Bridge::new("br0", &["tap0", "tap1"])?;
    let listener = TcpListener::bind((HOST, PORT))?;
    listener.set_nonblocking(true)?;
    let file = dir.join("snapshot");
    let guest = guest.clone().argument("--net", &format!("tap0,mac={MAC}"));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for("net ready")?;
    ping(Command::new("ping"))?;
    let boot_id = fetch("boot_id")?;
    ensure!(bridge.tap_of(MAC)? == Some("tap0"), "the guest's frames did not come from tap0");
    let old = accept(&listener)?;
    kept_in_the_middle_of_a_download(&vm, &file)?;
    vm.snapshot_and_stop(&file)?;

    // What it holds unread makes this end answer with a reset, which nobody hears, and forget.
    drop(old);
    let _clock = gap.pass()?;
    let watch = Watch::on("tap1", "arp[14:4] = arp[24:4]")?;
    let mut vm = TestVm::restore_with(&file, &["--net", "net0=tap1"])?;
    let began = Instant::now();
    let announced = watch.seen()?;
    ensure!(announced.contains(MAC) && announced.contains(&GUEST.to_string()), "announced was {announced}");
    ensure!(bridge.tap_of(MAC)? == Some("tap1"), "the bridge does not know that the guest moved");
    vm.wait_for("net lost").context("the connection whose other end is gone")?;
    println!("  {announced}");
    println!("  the old connection was reset {} ms after vmm was started", began.elapsed().as_millis());
    says_beat(accept(&listener)?)?;
    ping(Command::new("ping"))?;
    ensure!(fetch("boot_id")? == boot_id, "another boot");
    let lag = wall_lag(&mut vm)?;
    ensure!(lag < Duration::from_secs(1), "the guest's wall clock is off by {lag:?}");
    long_file()
}

/// The guest stands still while a connection is busy; not a byte is lost, or comes twice.
fn kept_in_the_middle_of_a_download(vm: &TestVm, file: &Path) -> Result<()> {
    let download = std::thread::spawn(long_file);
    vm.snapshot(file, "resume")?;
    download.join().map_err(|_| anyhow::anyhow!("the download panicked"))?
}

/// A tap that another process opened, which here is the story's own: the monitor is told the number of its descriptor, when it
/// boots the machine and again when it restores it.
///
/// # Errors
/// The guest isn't reached by it, or is restored without one.
pub fn by_descriptor(guest: &Guest, dir: &Path) -> Result<()> {
    let _bridge = Bridge::new("br0", &["tap0"])?;
    let tap = open_tap("tap0")?;
    let (file, fd) = (dir.join("snapshot"), tap.as_raw_fd());
    let mut vm = TestVm::start(&guest.clone().argument("--net", &format!("fd={fd}")).run_args())?;
    vm.wait_for("net ready")?;
    ping(Command::new("ping"))?;
    vm.snapshot_and_stop(&file)?;
    let path = file.display().to_string();
    refused(
        vmm_with(["restore", &path]),
        1,
        &["network device `net0` had a tap that came as a file descriptor"],
    )?;
    let mut vm = TestVm::restore_with(&file, &["--net", &format!("net0=fd:{fd}")])?;
    vm.wait_for(guest.pulse)?;
    ping(Command::new("ping"))?;
    let status = vm.ask("status", &[])?;
    ensure!(status["networks"][0]["tap"] == format!("fd:{fd}"), "{status}");
    Ok(())
}

/// The oracle, with frames on their way.
///
/// # Errors
/// Names what differs.
pub fn network_oracle(guest: &Guest, dir: &Path) -> Result<()> {
    let _bridge = Bridge::new("br0", &["tap0"])?;
    capture_again(&guest.clone().argument("--net", "tap0"), dir)
}

/// Taps that can't be had.
///
/// # Errors
/// One is had, or refused in other words.
pub fn no_such_tap(guest: &Guest, dir: &Path) -> Result<()> {
    let _bridge = Bridge::new("br0", &["tap0"])?;
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.clone().argument("--net", "tap0").run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot(&file, "resume")?;
    let file = file.display().to_string();
    let restore = |words: &[&'static str]| vmm_with([&["restore", &file][..], words].concat());
    refused(restore(&[]), 1, &["device `net0`: tap `tap0` is in use by another process"])?;
    refused(restore(&["--net", "net0=br0"]), 1, &["`br0` is no tap"])?;
    refused(restore(&["--net", "net0=fd:0"]), 1, &["file descriptor 0 is no tap"])?;
    refused(restore(&["--net", "net1=tap1"]), 1, &["no network device `net1` in the snapshot: it has net0"])?;
    refused(restore(&["--net", "net0=a/b"]), 2, &["`a/b` is no interface's name"]).map(drop)
}

/// A connection that the guest makes.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    until("a connection from the guest", || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e.into()),
    })
}

fn says_beat(mut connection: TcpStream) -> Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_read_timeout(Some(LIMIT))?;
    let mut said = [0; 5];
    connection.read_exact(&mut said)?;
    ensure!(&said == b"beat\n", "the guest says {said:?}");
    Ok(())
}

/// A file that the guest serves.
fn fetch(name: &str) -> Result<Vec<u8>> {
    let mut connection = TcpStream::connect((GUEST, 80)).context("cannot connect to the guest")?;
    connection.set_read_timeout(Some(LIMIT))?;
    write!(connection, "GET /{name} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").context("no HTTP answer")? + 4;
    ensure!(answer.starts_with(b"HTTP/1.") && answer.len() > body, "no file /{name}");
    Ok(answer.split_off(body))
}

fn long_file() -> Result<()> {
    let body = fetch("long")?;
    ensure!(body.len() == LONG, "{} bytes of {LONG}", body.len());
    ensure!(body.chunks_exact(8).all(|line| line == b"0123456\n"), "the bytes are not those that were sent");
    Ok(())
}
