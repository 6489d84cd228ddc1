//! The guest's network, which is the workload's too.
//!
//! In: an address, or what was recorded of it on `/persist`. Out: `eth0` with that address, down, and then up. Holds: while a
//! connection is restored the interface is down: what peers send waits on the host, and is there when the interface comes up.

use crate::place;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::ErrorKind;
use std::process::Command;

const RECORD: &str = "/persist/.checkpoint/network";
const INTERFACE: &str = "eth0";
/// Without a route to its peer no connection is restored, even one that may send nothing yet. This one leads nowhere, and any other
/// comes before it.
const NOWHERE: [&str; 5] = ["default", "dev", "lo", "metric", "4000000000"];

/// An interface's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    /// With its prefix: `10.0.0.2/24`.
    pub(crate) address: String,
    pub(crate) gateway: Option<String>,
}

impl Network {
    fn recorded() -> Result<Option<Network>> {
        let text = match fs::read_to_string(RECORD) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(format!("cannot read {RECORD}")),
        };
        let mut lines = text.lines();
        let address = lines.next().with_context(|| format!("{RECORD} is empty"))?.to_owned();
        Ok(Some(Network { address, gateway: lines.next().map(str::to_owned) }))
    }

    /// Keeps it for the kernels to come.
    pub(crate) fn record(&self) -> Result<()> {
        let gateway = self.gateway.iter().map(|gateway| format!("{gateway}\n"));
        place::put(RECORD, &format!("{}\n{}", self.address, gateway.collect::<String>()))
    }
}

/// Gives the interface the recorded address, if there is one, and leaves it down.
pub(crate) fn attach() -> Result<()> {
    let Some(network) = Network::recorded()? else { return Ok(()) };
    ip(&["link", "set", "lo", "up"])?;
    ip(&["addr", "replace", &network.address, "dev", INTERFACE])?;
    ip(&[&["route", "replace"], &NOWHERE[..]].concat())
}

/// Brings the interface up, with the recorded gateway.
pub(crate) fn up() -> Result<()> {
    let Some(network) = Network::recorded()? else { return Ok(()) };
    ip(&["link", "set", INTERFACE, "up"])?;
    if let Some(gateway) = &network.gateway {
        ip(&["route", "replace", "default", "via", gateway])?;
    }
    // It is there if this kernel was attached and not up before.
    let _ = ip(&[&["route", "del"], &NOWHERE[..]].concat());
    Ok(())
}

fn ip(words: &[&str]) -> Result<()> {
    let said = Command::new("ip").args(words).output().context("cannot run ip")?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "ip {}: {}", words.join(" "), complaint.trim_end());
    Ok(())
}
