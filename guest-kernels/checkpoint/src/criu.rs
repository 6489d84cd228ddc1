//! CRIU, which does the work.
//!
//! In: the first process of a container, or images of one. Out: images, or the process. Holds: what CRIU is told when it dumps
//! and when it restores stands beside each other here; an error is CRIU's own reason, out of its log.

use crate::container::EXTERNAL;
use crate::group;
use crate::place::Images;
use crate::timers;
use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Said at dump and at restore: connections are kept, and it is `hold.rs` that keeps packets away from them.
const BOTH: [&str; 4] = ["--tcp-established", "--file-locks", "--ext-unix-sk", "--manage-cgroups=ignore"];
/// What CRIU has found out about this kernel. It talks to itself over the loopback interface for it, which takes a network.
const KERNEL: &str = "/run/criu.kdat";
/// How lines begin that CRIU calls errors and that are none: it asks for devices that containers with a network of their own need.
const HARMLESS: [&str; 3] = ["tun: ", "-95 reported by netlink", "net: Unable to create a veth pair"];
/// Contents of files that have no name any more are in the images, up to here.
pub(crate) const GHOST_LIMIT: &str = "10M";

/// Has CRIU find out about this kernel, unless it has: afterwards the network may be held.
pub(crate) fn get_ready() -> Result<()> {
    if Path::new(KERNEL).exists() {
        return Ok(());
    }
    let said = Command::new("criu").arg("check").stdin(Stdio::null()).output().context("cannot run criu")?;
    let text = [said.stderr, said.stdout].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(Path::new(KERNEL).exists(), "criu check: {}", reason(&text).unwrap_or("it did not say why"));
    Ok(())
}

/// Memory only, while the processes run; later dumps need not have what did not change.
pub(crate) fn pre_dump(pid: i32) -> Result<Images> {
    let (mut criu, images) = dumping("pre-dump", pid)?;
    run(criu.args(BOTH), &images)?;
    Ok(images)
}

/// All of it, of a frozen group, which stays frozen.
pub(crate) fn dump(pid: i32) -> Result<Images> {
    let (mut criu, images) = dumping("dump", pid)?;
    criu.args(BOTH).args(["--leave-running", "--network-lock=skip", "--ghost-limit", GHOST_LIMIT]);
    criu.arg("--freeze-cgroup").arg(group::workload().path);
    run(&mut criu, &images)?;
    timers::arm_again(&images.dir)?;
    Ok(images)
}

fn dumping(verb: &str, pid: i32) -> Result<(Command, Images)> {
    let before = Images::newest()?;
    let images = Images::next()?;
    let mut criu = criu(verb, &images);
    criu.arg("--tree").arg(pid.to_string());
    for (name, path) in EXTERNAL {
        criu.arg("--external").arg(format!("mnt[{path}]:{name}"));
    }
    let earlier = before.as_ref().and_then(|before| before.dir.file_name());
    if verb == "pre-dump" || earlier.is_some() {
        criu.arg("--track-mem");
    }
    if let Some(earlier) = earlier {
        criu.arg("--prev-images-dir").arg(Path::new("..").join(earlier));
    }
    Ok((criu, images))
}

/// Restores the newest dump, into the workload's group, and returns the number of its first process.
pub(crate) fn restore() -> Result<i32> {
    let images = Images::newest()?.context("there is no dump on /persist")?;
    let pid_file = images.dir.join("pid");
    let _ = fs::remove_file(&pid_file);
    let group = group::workload();
    let mut entrance = group.entrance()?;
    group.thaw()?;
    let mut criu = criu("restore", &images);
    criu.args(BOTH).args(["--restore-detached", "--pidfile"]).arg(&pid_file);
    for (name, path) in EXTERNAL {
        criu.arg("--external").arg(format!("mnt[{name}]:{path}"));
    }
    let root = Root::bind()?;
    criu.arg("--root").arg(root.0);
    // SAFETY: a system call and nothing else, as what comes after a fork must be.
    unsafe { criu.pre_exec(move || entrance.write_all(b"0")) };
    run(&mut criu, &images)?;
    restored(&pid_file)
}

/// Processes to be carried to another machine.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The first.
    pub(crate) pid: i32,
    /// Whether they live in a container like the workload's.
    pub(crate) contained: bool,
}

/// Said at dump and at restore of a tree that goes to another machine.
const CARRIED: [&str; 3] = ["--file-locks", "--ext-unix-sk", "--manage-cgroups=ignore"];

/// What becomes of a tree that is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Run,
    Stop,
}

/// Writes the tree's images into a directory.
pub(crate) fn dump_tree(tree: &Tree, then: Then, dir: &Path) -> Result<()> {
    let images = Images { dir: dir.to_owned() };
    let mut criu = criu("dump", &images);
    criu.args(CARRIED).args(["--ghost-limit", GHOST_LIMIT]);
    criu.arg(match then {
        Then::Run => "--leave-running",
        Then::Stop => "--leave-stopped",
    });
    criu.args(["--tcp-established", "--network-lock=skip", "--tree"]).arg(tree.pid.to_string());
    for (name, path) in EXTERNAL.iter().filter(|_| tree.contained) {
        criu.arg("--external").arg(format!("mnt[{path}]:{name}"));
    }
    run(&mut criu, &images)?;
    timers::arm_again(dir)
}

/// Restores a tree from the images in a directory, and returns its first process.
pub(crate) fn restore_tree(tree: &Tree, dir: &Path) -> Result<i32> {
    let images = Images { dir: dir.to_owned() };
    let pid_file = dir.join("pid");
    let mut criu = criu("restore", &images);
    criu.args(CARRIED).args(["--tcp-close", "--restore-detached", "--pidfile"]).arg(&pid_file);
    let root = if tree.contained { Some(Root::bind()?) } else { None };
    criu.args(root.iter().flat_map(|root| ["--root", root.0]));
    for (name, path) in EXTERNAL.iter().filter(|_| tree.contained) {
        criu.arg("--external").arg(format!("mnt[{name}]:{path}"));
    }
    run(&mut criu, &images)?;
    restored(&pid_file)
}

fn restored(pid_file: &Path) -> Result<i32> {
    let pid = fs::read_to_string(pid_file).context("CRIU did not say which process it restored")?;
    pid.trim().parse().with_context(|| format!("CRIU restored process `{}`", pid.trim()))
}

/// The system's disk as a mount by itself, which CRIU makes the container's root of. Its own goes with the value.
struct Root(&'static str);

impl Root {
    fn bind() -> Result<Root> {
        let root = Root("/run/vmm-checkpoint");
        fs::create_dir_all(root.0)?;
        mount_bind("/", root.0).with_context(|| format!("cannot mount / on {}", root.0))?;
        Ok(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

fn criu(verb: &str, images: &Images) -> Command {
    let mut criu = Command::new("criu");
    criu.arg(verb).arg("--images-dir").arg(&images.dir).args(["--log-file", &log(verb), "-v2"]);
    criu.stdin(Stdio::null()).stdout(Stdio::null());
    // Out of the agent's reach: if who asked goes away, the agent kills what runs for him, and a process would not survive a CRIU that
    // is killed while it has code of its own in there.
    criu.process_group(0);
    criu
}

/// The log's name in the images.
fn log(verb: &str) -> String {
    format!("{verb}.log")
}

fn run(criu: &mut Command, images: &Images) -> Result<()> {
    let verb = criu.get_args().next().map(|verb| verb.to_string_lossy().into_owned()).unwrap_or_default();
    let said = criu.stderr(Stdio::piped()).output().context("cannot run criu")?;
    if said.status.success() {
        return Ok(());
    }
    let log = fs::read_to_string(images.dir.join(log(&verb))).unwrap_or_default();
    let complaint = String::from_utf8_lossy(&said.stderr);
    match reason(&log).or_else(|| reason(&complaint)) {
        Some(reason) => bail!("criu {verb}: {reason}"),
        None => {
            let last = log.lines().chain(complaint.lines()).rfind(|line| !line.trim().is_empty());
            bail!("criu {verb}: {}, after `{}`", said.status, last.unwrap_or_default().trim())
        }
    }
}

/// The first error of a log: what comes after it follows from it.
///
/// `(00.123456)     12: Error (criu/files-reg.c:2170): Can't open file persist/data on restore: No such file or directory`
pub(crate) fn reason(log: &str) -> Option<&str> {
    let mut errors =
        log.lines().filter_map(|line| Some(line.split_once("Error (")?.1.split_once("): ")?.1.trim()));
    errors.find(|error| !HARMLESS.iter().any(|harmless| error.starts_with(harmless)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_first_error() {
        let log = "(00.000001) Warn  (criu/a.c:1): something\n\
                   (00.013711)      7: Error (criu/files-reg.c:2170): Can't open file persist/x on restore: No such file or directory\n\
                   (00.013720) Error (criu/cr-restore.c:2547): Restoring FAILED.\n";
        assert_eq!(reason(log), Some("Can't open file persist/x on restore: No such file or directory"));
        assert_eq!(reason("nothing\n"), None);
        let early = "Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n\
                     Error (criu/kerndat.c:727): Unable to connect a socket: Connection timed out\n";
        assert_eq!(reason(early), Some("Unable to connect a socket: Connection timed out"));
    }
}
