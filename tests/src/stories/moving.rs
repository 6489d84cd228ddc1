//! Stories of one tree of processes that is carried to another machine as a file.
//!
//! In: two kernels, a directory. Out: nothing, or what was lost. Holds: the tree's own log tells that it went on: its numbers have no
//! gap, and the kernel beside them changes.

use super::carrying::guest;
use crate::vm::{TestVm, program, vmm};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where the tree writes its beats.
const LOG: &str = "/tmp/log";
/// Starts the tree with a number that no other guest has given away, and tells which it was.
const START: &str = "echo 20000 > /proc/sys/kernel/ns_last_pid; \
    setsid workload alone /tmp/log </dev/null >/dev/null 2>&1 & until [ -s /tmp/log ]; do sleep 0.1; done; echo $!";
/// Processes that can't be carried, each with a reason.
const TIED: [(&str, &str); 3] = [
    ("sleep 1000 </dev/null >/dev/null 2>&1 & echo $!", "start it with setsid"),
    (
        "(setsid sh -c 'echo $$ >/tmp/tied; exec sleep 1000' 2>/dev/null | sleep 1000) </dev/null >/dev/null 2>&1 & \
         sleep 0.5; cat /tmp/tied",
        "has a pipe to process",
    ),
    (
        "setsid sh -c 'exec 3</dev/vsock; sleep 1000' </dev/null >/dev/null 2>&1 & sleep 0.5; echo $!",
        "has /dev/vsock open: criu dump",
    ),
];

/// A guest with CRIU, without a disk of its own.
struct Machine {
    vm: TestVm,
    version: String,
}

impl Machine {
    fn boot(version: &str, cmdline: &str, dir: &Path) -> Result<Machine> {
        let vsock = dir.join(format!("vsock-{version}{cmdline}")).display().to_string();
        let guest = guest(version)
            .cmdline(cmdline)
            .argument("--disk", "path=/guests/root,id=root,readonly=on")
            .argument("--vsock", &vsock);
        let mut vm = TestVm::start(&guest.run_args())?;
        vm.wait_for("ready kernel=")?;
        Ok(Machine { vm, version: version.to_owned() })
    }

    /// What a verb of `vmm` prints, asked of this machine.
    fn ask(&self, verb: &[&str], words: &[&str]) -> Result<String> {
        let socket = ["--api", self.vm.socket().to_str().context("path")?, "--"];
        let done = vmm([verb, &socket, words].concat())?;
        let complaint = String::from_utf8_lossy(&done.stderr).trim_end().to_owned();
        ensure!(done.status.success(), "{complaint}");
        Ok(String::from_utf8_lossy(&done.stdout).trim_end().to_owned())
    }

    fn shell(&self, script: &str) -> Result<String> {
        self.ask(&["exec"], &["sh", "-c", script])
    }

    fn checkpoint(&self, pid: &str, file: &str) -> Result<String> {
        self.ask(&["checkpoint", "--pid", pid], &[file])
    }

    fn restore(&self, file: &str) -> Result<String> {
        self.ask(&["restore-process"], &[file])
    }

    /// Waits for three more beats and returns the whole log.
    fn beats(&self) -> Result<String> {
        let three_more = format!(
            "n=$(wc -l <{LOG}); i=0; until [ $(wc -l <{LOG}) -ge $((n + 3)) ]; do i=$((i + 1)); [ $i -lt 600 ] || exit 1; \
             sleep 0.1; done; cat {LOG}"
        );
        self.shell(&three_more).with_context(|| format!("no more beats on {}", self.version))
    }
}

/// It fails, for this reason, in one line.
fn refused<T>(done: Result<T>, why: &str) -> Result<()> {
    let said = done.err().with_context(|| format!("it works, in spite of: {why}"))?.to_string();
    println!("  {said}");
    ensure!(said.contains(why) && said.lines().count() == 1, "{why}: {said}");
    Ok(())
}

/// The tree is written to a file and goes on in a second machine with another kernel, unless something is missing there or in its
/// place, which is named; the file is refused if it is damaged.
///
/// # Errors
/// It doesn't go on, or not from where it was, or what is in the way is not named.
pub fn moved(from: &str, to: &str, dir: &Path) -> Result<()> {
    let (copy, file) = (dir.join("copy").display().to_string(), dir.join("process").display().to_string());
    let (one, two) = (Machine::boot(from, "", dir)?, Machine::boot(to, "", dir)?);
    let pid = one.shell(START)?;
    refused(one.checkpoint("31000", &file), "no process 31000")?;
    one.checkpoint(&pid, &copy)?;
    whole(&one.beats()?, &[from]).context("after it was copied")?;
    refused(one.restore(&copy), &format!("process number {pid} is taken, by `workload`"))?;
    one.ask(&["checkpoint", "--end", "--pid", &pid], &[&file])?;
    let gone = format!("while [ -e /proc/{pid} ]; do sleep 0.1; done");
    // Its parent may not have asked yet how it ended.
    one.shell(&gone)?;
    refused(one.checkpoint(&pid, &copy), &format!("no process {pid}"))?;

    refused(two.restore(&file), "tmp/log")?;
    let log = one.shell(&format!("cat {LOG}"))?;
    two.shell(&format!("echo '{log}' > {LOG}"))?;
    // Another may get the number, the guest's own ticks do with processes. Those that come after it are to leave the numbers of the
    // tree's other processes alone.
    let taken = format!(
        "until echo $(({pid} - 1)) > /proc/sys/kernel/ns_last_pid; sleep 1000 </dev/null >/dev/null 2>&1 & \
         [ $! -eq {pid} ]; do kill $!; done; echo 30000 > /proc/sys/kernel/ns_last_pid"
    );
    two.shell(&taken)?;
    refused(two.restore(&file), &format!("process number {pid} is taken, by `sleep`"))?;
    two.shell(&format!("kill {pid}; {gone}"))?;
    let restored = two.restore(&file)?;
    ensure!(restored == pid, "process {pid} is now {restored}");
    let told = two.beats()?;
    println!("  process {pid}: {}", told.lines().last().unwrap_or_default());
    whole(&told, &[from, to])?;
    damaged(&two, &file)
}

/// Beats without a gap, each kernel's after those of the one before it, by one process.
fn whole(log: &str, kernels: &[&str]) -> Result<()> {
    let mut seen: Vec<&str> = Vec::new();
    for (line, number) in log.lines().zip(1..) {
        let beat = line
            .strip_prefix(&format!("beat {number} kernel="))
            .with_context(|| format!("{number}: {line}"))?;
        let kernel = kernels
            .iter()
            .find(|kernel| beat.starts_with(&format!("{kernel}.")))
            .with_context(|| line.to_owned())?;
        if seen.last() != Some(kernel) {
            seen.push(kernel);
        }
    }
    ensure!(seen == kernels, "it has run on {seen:?}");
    Ok(())
}

/// A file that is not what was written reaches no guest.
fn damaged(machine: &Machine, file: &str) -> Result<()> {
    let mut bytes = std::fs::read(file)?;
    let other = format!("{file}.other");
    std::fs::write(&other, &bytes[..bytes.len() - 100])?;
    refused(machine.restore(&other), "instead of")?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&other, &bytes)?;
    refused(machine.restore(&other), "is damaged")
}

/// Processes that can't be carried: the reason is named, and they go on.
///
/// # Errors
/// One is carried, or the reason isn't named, or it does not go on.
pub fn not_moved(from: &str, to: &str, dir: &Path) -> Result<()> {
    let file = dir.join("process").display().to_string();
    let one = Machine::boot(from, "", dir)?;
    for (start, why) in TIED {
        let pid = one.shell(start)?;
        refused(one.checkpoint(&pid, &file), why)?;
        refused(one.ask(&["checkpoint", "--end", "--pid", &pid], &[&file]), why)?;
        let state = one.shell(&format!("cut -d ' ' -f 3 /proc/{pid}/stat; kill -- {pid}"))?;
        ensure!(state == "S", "process {pid} is in state {state}");
    }
    refused(one.checkpoint("1", &file), "this very program")?;
    refused(one.checkpoint("2", &file), "the kernel's")?;
    let pid = one.shell(START)?;
    interrupted(&one, &pid, &file)?;
    ensure!(!Path::new(&file).exists(), "there is a file");
    one.checkpoint(&pid, &file)?;
    // The kernel leaves wide registers switched off: to programs the processor is one without them.
    let two = Machine::boot(to, "noxsave", dir)?;
    refused(two.restore(&file), "this processor has no xsave")
}

/// Who wants the file is killed, at any moment: the processes go on.
fn interrupted(machine: &Machine, pid: &str, file: &str) -> Result<()> {
    for after in [200, 500, 1000, 1500, 2000].map(Duration::from_millis) {
        let socket = machine.vm.socket().to_str().context("path")?;
        let words = ["checkpoint", "--pid", pid, "--api", socket, file];
        let mut asked = Command::new(program()).args(words).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        // It may be done already.
        let _ = asked.kill();
        asked.wait()?;
        whole(&machine.beats()?, &[&machine.version]).with_context(|| format!("killed after {after:?}"))?;
        // CRIU comes to its own end.
        machine.shell(
            "while case $(cat /proc/[0-9]*/comm 2>/dev/null) in *criu*) true ;; *) false ;; esac; do sleep 0.1; done",
        )?;
        let _ = std::fs::remove_file(file);
    }
    println!("  whoever asks may be killed");
    Ok(())
}
