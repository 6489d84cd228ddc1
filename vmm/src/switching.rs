//! The verbs by which a VM's kernels take turns.
//!
//! In: their arguments. Out: requests to the VM's process, and its answers. Holds: every path is absolute, since that process may have
//! another working directory.

use crate::{ask, print};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use vmm::api::{BootRequest, Command as Verb, ImageRequest, KeptKernel, SwitchRequest};
use vmm::cli::{NewcomerArgs, PrepareArgs, SuspendArgs, SwitchArgs, UpgradeArgs};
use vmm::upgrade;

/// What a kernel's init is to do is told by a word on its command line.
pub(crate) fn suspend_with(args: &SuspendArgs) -> Result<ExitCode> {
    let then = args.write_to.as_ref().map_or(String::new(), |_| format!(" image={}", args.then.word()));
    let boot = BootRequest {
        kernel: here(&args.kernel)?,
        initrd: args.initrd.as_ref().map(here).transpose()?,
        cmdline: format!("{}{then}", args.cmdline),
        memory_bytes: Some(args.memory),
        vcpus: Some(args.cpus),
        name: args.name.clone(),
        share_disks: false,
        image: Some(ImageRequest { write_to: args.write_to.as_ref().map(here).transpose()? }),
    };
    ask(&args.remote, &Verb::Switch(SwitchRequest { boot: Some(boot), ..SwitchRequest::default() }))
}

pub(crate) fn upgrade(args: &UpgradeArgs) -> Result<ExitCode> {
    let wish = upgrade::Wish {
        api: args.remote.api.clone(),
        boot: boot_request(&args.boot.kernel, &args.boot.newcomer, true)?,
        ready: args.ready.as_ref().map(here).transpose()?,
        pre_dumps: args.pre_dump,
        boot_limit: Duration::from_secs(args.boot_limit),
        limit: Duration::from_secs(args.limit),
    };
    if args.dry_run {
        let told = upgrade::dry_run(&wish)?;
        return print(&if args.remote.json { serde_json::json!({ "told": told }).to_string() } else { told });
    }
    let report = upgrade::run(&wish)?;
    print(&if args.remote.json { serde_json::to_string(&report)? } else { report.to_string() })
}

pub(crate) fn prepare(args: &PrepareArgs) -> Result<ExitCode> {
    let boot = boot_request(&args.boot.kernel, &args.boot.newcomer, args.share_disks)?;
    ask(&args.remote, &Verb::Prepare(boot))
}

/// What the process of the VM is told to boot.
fn boot_request(kernel: &Path, newcomer: &NewcomerArgs, share_disks: bool) -> Result<BootRequest> {
    Ok(BootRequest {
        kernel: here(kernel)?,
        initrd: newcomer.initrd.as_ref().map(here).transpose()?,
        cmdline: newcomer.cmdline.clone(),
        memory_bytes: newcomer.memory,
        vcpus: newcomer.cpus,
        name: newcomer.name.clone(),
        share_disks,
        image: None,
    })
}

pub(crate) fn switch(args: &SwitchArgs) -> Result<ExitCode> {
    let boot = args.kernel.as_ref().map(|kernel| boot_request(kernel, &args.newcomer, args.share_disks));
    let kept = args.to_snapshot.as_ref().map(|file| {
        let (name, share_disks) = (args.newcomer.name.clone(), args.share_disks);
        anyhow::Ok(KeptKernel { path: here(file)?, name, share_disks })
    });
    let request = SwitchRequest {
        to: args.to.clone(),
        boot: boot.transpose()?,
        snapshot: kept.transpose()?,
        keep_in: args.keep_in.as_ref().map(here).transpose()?,
        time: args.time.into(),
        trial: args.trial,
    };
    ask(&args.remote, &Verb::Switch(request))
}

fn here(path: impl AsRef<Path>) -> Result<PathBuf> {
    let path = path.as_ref();
    std::path::absolute(path).with_context(|| format!("{}", path.display()))
}
