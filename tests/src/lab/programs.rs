//! Our own programs, as cargo builds them.
//!
//! In: the workspace. Out: paths of static programs. Holds: they are as new as their sources.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Packages and programs.
const FOR_GUESTS: [(&str, &str); 6] = [
    ("guest-kernels", "witness"),
    ("guest-kernels", "sockets"),
    ("guest-kernels", "vmm-image"),
    ("guest-kernels", "workload"),
    ("agent", "vmm-agent"),
    ("checkpoint", "vmm-checkpoint"),
];

/// What runs in the lab, and in its guests.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// The monitor.
    pub(super) vmm: PathBuf,
    /// Programs for guests: one notices what a snapshot loses, one speaks through sockets, one writes
    /// what an image kernel is for, one holds on to all that a change of kernel could lose, one does what
    /// `vmm exec` asks, and one takes processes off a kernel and puts them back.
    pub(super) for_guests: Vec<PathBuf>,
}

impl Programs {
    /// Has cargo build them. Quick when there is nothing to do. `vmm` may be one that was built elsewhere.
    pub(super) fn build(vmm: Option<PathBuf>) -> Result<Programs> {
        let mut packages = FOR_GUESTS.to_vec();
        if vmm.is_none() {
            packages.push(("vmm", "vmm"));
        }
        let messages = cargo_build(&packages)?;
        let path =
            |name| executable(&messages, name).with_context(|| format!("cargo didn't say where {name} is"));
        let for_guests = FOR_GUESTS.into_iter().map(|(_, name)| path(name)).collect::<Result<_>>()?;
        Ok(Programs { for_guests, vmm: vmm.map_or_else(|| path("vmm"), Ok)? })
    }
}

/// Builds these (package, program) pairs and returns cargo's messages, one JSON object a line.
fn cargo_build(programs: &[(&str, &str)]) -> Result<String> {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--quiet", "--message-format", "json-render-diagnostics"]);
    // Cargo looks for its configuration, by which programs are static, from here on upwards.
    build.current_dir(workspace);
    for (package, program) in programs {
        build.args(["--package", package, "--bin", program]);
    }
    let output = build.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo cannot build the programs of the lab");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The path of a program that cargo's messages tell of.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut named = messages.filter(|message| message["target"]["name"] == name);
    named.find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_by_name_among_cargos_messages() {
        let messages = r#"{"target":{"name":"vmm"},"executable":null}
                          {"target":{"name":"witness"},"executable":"/t/witness"}
                          {"target":{"name":"vmm"},"executable":"/t/vmm"}
                          noise"#;
        assert_eq!(executable(messages, "vmm"), Some(PathBuf::from("/t/vmm")));
        assert_eq!(executable(messages, "other"), None);
    }
}
