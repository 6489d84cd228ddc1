//! What would stand in the way.
//!
//! In: this kernel, and the workload if there is one. Out: a line for each obstacle, and an error that tells how many. Holds:
//! nothing is changed; programs that a dump or a restore needs are in memory afterwards.

use crate::place::{PERSIST, Record};
use crate::{criu, group, rehearsal, warm};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// By which CRIU asks about sockets, and holds connections. Each is a module in Debian's kernels, or built in.
const MODULES: [&str; 4] = ["nf_tables", "tcp_diag", "udp_diag", "unix_diag"];
/// Device nodes without a state.
const STATELESS: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

pub(crate) fn check() -> Result<()> {
    let mut obstacles: Vec<String> = [kernel()?, modules()].into_iter().flatten().collect();
    let record = Record::read()?;
    if record.as_ref().is_some_and(Record::runs) {
        for pid in group::workload().members() {
            obstacles.extend(open_files(pid));
        }
        obstacles.extend(room()?);
    }
    warm::programs();
    if obstacles.is_empty()
        && let Err(error) = rehearsal::rehearse()
    {
        obstacles.push(format!("a rehearsal fails: {error:#}"));
    }
    match &obstacles[..] {
        [] => {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            println!(
                "ok kernel={release} workload={}",
                record.map_or("none".to_owned(), |record| record.name)
            );
            Ok(())
        }
        [only] => bail!("{only}"),
        all => {
            all.iter().for_each(|obstacle| eprintln!("{obstacle}"));
            bail!("{}, and {} more in the way", all[0], all.len() - 1)
        }
    }
}

/// What CRIU finds missing in this kernel.
fn kernel() -> Result<Option<String>> {
    let said = Command::new("criu").arg("check").stdin(Stdio::null()).output().context("cannot run criu")?;
    if said.status.success() {
        return Ok(None);
    }
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let reason = criu::reason(&text).or(text.lines().last()).unwrap_or("it did not say why");
    Ok(Some(format!("criu check: {reason}")))
}

fn modules() -> Option<String> {
    let missing: Vec<&str> =
        MODULES.into_iter().filter(|name| !Path::new("/sys/module").join(name).is_dir()).collect();
    (!missing.is_empty()).then(|| format!("kernel modules are not loaded: {}", missing.join(", ")))
}

/// Files that another kernel would not have.
pub(crate) fn open_files(pid: i32) -> Vec<String> {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = open.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    let paths = links.filter_map(|link| link.into_os_string().into_string().ok());
    let strange = paths.filter(|path| {
        let device = path.starts_with("/dev/") && !STATELESS.contains(&path.as_str());
        device || ["/sys/", "/proc/"].iter().any(|outside| path.starts_with(outside))
    });
    strange.map(|path| format!("process {pid} has {path} open")).collect()
}

/// The images take no more than the memory of the workload.
fn room() -> Result<Option<String>> {
    let free = rustix::fs::statvfs(PERSIST).with_context(|| format!("cannot look at {PERSIST}"))?;
    let free = free.f_bavail * free.f_frsize;
    let needed: u64 = group::workload().members().into_iter().map(resident).sum();
    Ok((needed > free).then(|| {
        format!("{PERSIST} has {} MiB free, and the workload {} MiB of memory", free >> 20, needed >> 20)
    }))
}

/// Bytes of private memory of a process; none of one that has ended.
fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    kib.unwrap_or(0) * 1024
}
