//! The network, held.
//!
//! In: nothing. Out: a table of ours in nf_tables, or none. Holds: while it is there, no IP packet comes in or goes out, on any
//! interface; what comes is as lost as on a bad wire, and its sender tries again.

use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::process::{Command, Stdio};

/// Adding what may be there and deleting it works in any case.
const RELEASE: &str = "add table inet vmm_hold\ndelete table inet vmm_hold\n";
const HOLD: &str = "table inet vmm_hold {
    chain in { type filter hook prerouting priority -400; policy drop; }
    chain out { type filter hook output priority -400; policy drop; }
}\n";

pub(crate) fn hold() -> Result<()> {
    nft(&format!("{RELEASE}{HOLD}")).context("cannot hold the network")
}

pub(crate) fn release() -> Result<()> {
    nft(RELEASE).context("cannot release the network")
}

/// All of the script takes effect at once, or nothing.
fn nft(script: &str) -> Result<()> {
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = nft.spawn().context("cannot run nft")?;
    child.stdin.take().context("nft has no input")?.write_all(script.as_bytes())?;
    let said = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "nft: {}", complaint.lines().next().unwrap_or("it did not say why"));
    Ok(())
}
