//! `lab`: a shell command, or a shell, in the lab.
//!
//! In: the command as the one argument or in `RUN`, and `LANE`, `HOST`, `KVM_ARGS`, `EXTRA`, `LIMIT`, `VMM`. Out: the
//! command's output and its status. Holds: nothing but the command's output goes to standard output.

use anyhow::{Context, Result, bail};
use std::env;
use std::process::ExitCode;
use std::time::Duration;
use vmm_tests::lab::Lab;

/// The status when the lab itself failed.
const LAB_FAILED: u8 = 125;

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(LAB_FAILED)
        }
    }
}

fn run() -> Result<u8> {
    let command = command()?;
    let lab = lab(command.is_none())?;
    match command {
        Some(command) => lab.stream(&command, &mut std::io::stdout()),
        None => lab.shell(),
    }
}

fn command() -> Result<Option<String>> {
    let mut args = env::args().skip(1);
    match (args.next(), args.next()) {
        (_, Some(_)) => bail!("expected one argument, the whole shell command; quote it"),
        (Some(command), None) => Ok(Some(command)),
        (None, None) => Ok(variable("RUN")?),
    }
}

fn lab(interactive: bool) -> Result<Lab> {
    let mut lab = Lab::new();
    if let Some(lane) = variable("LANE")? {
        lab = lab.lane(lane.parse()?);
    }
    if let Some(host) = variable("HOST")? {
        lab = lab.host(&host);
    }
    if let Some(args) = variable("KVM_ARGS")? {
        lab = lab.kvm_args(&args);
    }
    if let Some(dir) = variable("EXTRA")? {
        lab = lab.extra(dir);
    }
    if let Some(program) = variable("VMM")? {
        lab = lab.vmm(program);
    }
    match variable("LIMIT")? {
        Some(limit) => Ok(lab.limit(seconds(&limit)?)),
        // Nobody wants to be thrown out while typing.
        None if interactive => Ok(lab.limit(None)),
        None => Ok(lab),
    }
}

/// An environment variable; one that is empty counts as unset.
fn variable(name: &str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => bail!("{name} is not UTF-8"),
    }
}

fn seconds(limit: &str) -> Result<Duration> {
    let seconds = limit.parse().ok().filter(|&seconds| seconds > 0);
    seconds.map(Duration::from_secs).with_context(|| format!("LIMIT is \"{limit}\", expected seconds"))
}
