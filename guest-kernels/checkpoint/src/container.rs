//! What the workload lives in: process numbers, mounts and a monotonic clock of its own.
//!
//! In: a name and a command. Out: the number of the container's first process, when the command runs. Holds: all that the
//! container's processes can open is the system's read-only disk, `/persist`, and memory of their own, so that all of it is
//! there on another kernel.
//!
//! ```text
//! start    vmm-checkpoint            makes the namespaces for its child
//!  └ 1     vmm-checkpoint contain    in them: mounts; becomes
//!    1     /persist/.checkpoint/init a copy of this program: waits for all processes of the container
//!      └   the command
//! ```

use crate::group;
use crate::place::{HOME, PERSIST};
use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::mount::{mount, mount_bind, mount_change, unmount};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Mounts that a container has from its kernel, by the names that CRIU knows them under. All others are its own.
pub(crate) const EXTERNAL: [(&str, &str); 2] = [("dev", "/dev"), ("persist", PERSIST)];
/// What a container's processes find programs by, and nothing that a kernel's initramfs brought along.
const PATH: &str = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a container has as `/tmp`.
const TMP: &str = "/run/.tmp";

/// The copy of this program that is a container's first process; it stays what it is while the container lives.
fn init_program() -> PathBuf {
    Path::new(HOME).join("init")
}

/// Starts the command in a container and returns the number of the container's first process.
pub(crate) fn start(name: &str, command: &[OsString]) -> Result<i32> {
    copy_init()?;
    let mut entrance = group::workload().entrance()?;
    // SAFETY: takes effect for children only, of which this process has none and no threads either.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWTIME) }
        .context("cannot make namespaces")?;
    let mut contain = Command::new(init_program());
    contain.args(["contain", "--name", name, "--"]).args(command);
    contain.env_clear().env("PATH", PATH).env("HOME", "/root");
    contain.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: both calls are system calls and nothing else, as what comes after a fork must be.
    unsafe {
        contain.pre_exec(move || {
            entrance.write_all(b"0")?;
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = contain.spawn().context("cannot start a container")?;
    // Ends when the command runs, or says why it does not.
    let mut complaint = String::new();
    child.stdout.take().context("the container has no output")?.read_to_string(&mut complaint)?;
    if !complaint.is_empty() {
        bail!("{}", complaint.trim_end());
    }
    if let Some(status) = child.try_wait()? {
        bail!("the container ended at once: {status}");
    }
    Ok(child.id().cast_signed())
}

/// Starts a container in which next to nothing runs, and returns the number of its first process.
pub(crate) fn start_empty() -> Result<i32> {
    // SAFETY: takes effect for children only, of which this process has none and no threads either.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWTIME) }
        .context("cannot make namespaces")?;
    let mut sleep = Command::new(std::env::current_exe()?);
    sleep.arg("sleep").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    // SAFETY: a system call and nothing else, as what comes after a fork must be.
    unsafe { sleep.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into)) };
    let mut child = sleep.spawn().context("cannot start a container")?;
    let mut complaint = String::new();
    child.stdout.take().context("the container has no output")?.read_to_string(&mut complaint)?;
    ensure!(complaint.is_empty(), "{}", complaint.trim_end());
    Ok(child.id().cast_signed())
}

/// The first process of that container, which becomes a program that does nothing.
pub(crate) fn sleep() -> Result<()> {
    // Ends when that program runs.
    let mut starter = File::from(rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)?);
    let slept = arrange().and_then(|()| {
        // What this process got was opened among the mounts of its starter.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        Ok(Command::new("sleep").arg("infinity").exec())
    });
    writeln!(
        starter,
        "{}",
        slept.map_or_else(|error| format!("{error:#}"), |error| format!("sleep: {error}"))
    )?;
    Ok(())
}

fn copy_init() -> Result<()> {
    let (from, to) = (std::env::current_exe()?, init_program());
    let unfinished = to.with_extension("unfinished");
    fs::copy(&from, &unfinished)
        .and_then(|_| fs::rename(&unfinished, &to))
        .with_context(|| format!("cannot write {}", to.display()))
}

/// The first process of a container: makes its mounts, and becomes its init.
pub(crate) fn contain(name: &str, command: &[OsString]) -> Result<()> {
    let arranged = arrange().map(|()| {
        // The program that is running was opened among the mounts of before.
        let mut init = Command::new(init_program());
        init.args(["init", "--name", name, "--"]).args(command).exec()
    });
    // The pipe to whoever started the container.
    match arranged {
        Ok(error) => println!("cannot start the container's first process: {error}"),
        Err(error) => println!("cannot arrange a container: {error:#}"),
    }
    Ok(())
}

fn arrange() -> Result<()> {
    // SAFETY: no thread shares this process's mounts with it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("cannot make a mount namespace")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make the mounts private")?;
    for path in theirs(&fs::read_to_string("/proc/self/mounts")?) {
        unmount(&path, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {path}"))?;
    }
    let own = MountFlags::NOSUID | MountFlags::NODEV;
    mount("proc", "/proc", "proc", own | MountFlags::NOEXEC, None).context("cannot mount /proc")?;
    // One for both: CRIU has other programs pack each, while the processes wait.
    mount("tmpfs", "/run", "tmpfs", own, None).context("cannot mount /run")?;
    fs::create_dir(TMP).with_context(|| format!("cannot make {TMP}"))?;
    fs::set_permissions(TMP, fs::Permissions::from_mode(0o1777))?;
    mount_bind(TMP, "/tmp").context("cannot mount /tmp")?;
    std::env::set_current_dir("/").context("cannot go to /")
}

/// The mounts that a container does not have, the innermost first.
fn theirs(mounts: &str) -> Vec<String> {
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let kept = |path: &str| path == "/" || EXTERNAL.iter().any(|(_, kept)| *kept == path);
    let mut theirs: Vec<String> = paths.filter(|path| !kept(path)).map(str::to_owned).collect();
    theirs.reverse();
    theirs
}

/// Where the container's output goes.
pub(crate) fn log(name: &str) -> PathBuf {
    Path::new(PERSIST).join(format!("{name}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_last_goes_first_and_what_goes_along_stays() {
        let mounts = "/dev/vda / ext4 ro 0 0\nsysfs /sys sysfs rw 0 0\nudev /dev devtmpfs rw 0 0\n\
                      cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n/dev/vdb /persist ext4 rw 0 0\n";
        assert_eq!(theirs(mounts), ["/sys/fs/cgroup", "/sys"]);
    }
}
