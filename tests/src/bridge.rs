//! Networks on the host that stories connect guests to: a bridge with taps, network namespaces, what is seen on them.
//!
//! In: names. Out: interfaces with addresses, and where a bridge believes that a station is. Holds: what a value made goes
//! with it. It needs root and Debian's `ip`, which the lab has.

use crate::vm::until;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

/// The host's address on every network here.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// A bridge with an address, and taps at its ports.
pub struct Bridge {
    name: &'static str,
    taps: Vec<&'static str>,
}

impl Bridge {
    /// Makes them.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(name: &'static str, taps: &[&'static str]) -> Result<Self> {
        ip(&format!("link add {name} type bridge"))?;
        let mut bridge = Self { name, taps: Vec::new() };
        ip(&format!("addr add {HOST}/24 dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        for tap in taps {
            ip(&format!("tuntap add {tap} mode tap"))?;
            bridge.taps.push(tap);
            ip(&format!("link set {tap} master {name} up"))?;
        }
        Ok(bridge)
    }

    /// At which of its taps the bridge has seen the station last, if it has.
    ///
    /// # Errors
    /// The bridge's table can't be read.
    pub fn tap_of(&self, mac: &str) -> Result<Option<&'static str>> {
        // struct __fdb_entry: six bytes of address, the port's number, whether it is the bridge's own; 16 bytes in all.
        let table = fs::read(format!("/sys/class/net/{}/brforward", self.name))?;
        let text =
            |entry: &[u8]| entry[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        let Some(entry) = table.chunks_exact(16).find(|entry| entry[7] == 0 && text(entry) == mac) else {
            return Ok(None);
        };
        for tap in &self.taps {
            let number = fs::read_to_string(format!("/sys/class/net/{tap}/brport/port_no"))?;
            if u8::from_str_radix(number.trim().trim_start_matches("0x"), 16)? == entry[6] {
                return Ok(Some(tap));
            }
        }
        bail!("{mac} is at port {}, which none of {:?} is", entry[6], self.taps)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for tap in self.taps.iter().chain([&self.name]) {
            let _ = ip(&format!("link del {tap}"));
        }
    }
}

/// A network namespace with a tap, and the host's address on it.
pub struct Namespace {
    name: &'static str,
}

impl Namespace {
    /// Makes it.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(name: &'static str, tap: &str) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        let made = Self { name };
        ip(&format!("-n {name} tuntap add {tap} mode tap"))?;
        ip(&format!("-n {name} addr add {HOST}/24 dev {tap}"))?;
        ip(&format!("-n {name} link set {tap} up"))?;
        Ok(made)
    }

    /// A program to be run in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("/tools/bin/ip");
        command.args(["netns", "exec", self.name, program]);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// Opens a tap as a program does that gives it to a monitor: with the flags that `docs/network.md` names. Programs that are
/// started from now on inherit it.
///
/// # Errors
/// There is no such tap, or it isn't free.
pub fn open_tap(name: &str) -> Result<OwnedFd> {
    let file = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq of zeroes is one with an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(name.len() < request.ifr_name.len(), "no interface is called {name}");
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    // SAFETY: F_SETFD takes a number.
    let inherited = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    ensure!(set == 0 && inherited == 0, "tap {name}: {}", std::io::Error::last_os_error());
    Ok(file.into())
}

/// Runs `ip` with these words.
///
/// # Errors
/// What it says.
pub fn ip(words: &str) -> Result<()> {
    let output = Command::new("/tools/bin/ip").args(words.split(' ')).output().context("cannot run ip")?;
    ensure!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Sends the guest pings until it answers one. A busy lab's guest may be late for the first, whose host then gives up on its
/// address.
///
/// # Errors
/// It answers none within [`LIMIT`](crate::vm::LIMIT).
pub fn ping(mut command: Command) -> Result<()> {
    command.args(["-c", "1", "-W", "5", &GUEST.to_string()]);
    until("an answer to a ping", || {
        let output = command.output().context("cannot run ping")?;
        Ok(output.status.success().then_some(()))
    })
}

/// Waits for the first frame of a kind on an interface.
pub struct Watch(Child);

impl Watch {
    /// Begins to look for a frame that `filter` (as in pcap-filter(7)) takes.
    ///
    /// # Errors
    /// tcpdump can't be run, or not with this filter.
    pub fn on(interface: &str, filter: &str) -> Result<Self> {
        let mut child = Command::new("/tools/bin/tcpdump")
            .args(["-n", "-e", "-c", "1", "-i", interface, filter])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run tcpdump")?;
        let said = child.stderr.take().context("tcpdump has no standard error")?;
        let watch = Self(child);
        let mut said = BufReader::new(said);
        let mut line = String::new();
        while !line.starts_with("listening on") {
            line.clear();
            ensure!(said.read_line(&mut line)? > 0, "tcpdump does not listen on {interface}");
        }
        // It says more at its end, and must not be killed for that.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Ok(watch)
    }

    /// The frame, as tcpdump tells it.
    ///
    /// # Errors
    /// [`LIMIT`](crate::vm::LIMIT) passes without one.
    pub fn seen(mut self) -> Result<String> {
        until("such a frame", || Ok(self.0.try_wait()?))?;
        let mut line = String::new();
        self.0.stdout.take().context("tcpdump has no standard output")?.read_to_string(&mut line)?;
        ensure!(!line.is_empty(), "tcpdump ended without a frame");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
