//! The lab: a machine with a real `/dev/kvm`, on any host.
//!
//! In: a shell command. Out: what it printed, as it comes, and its exit status. Holds: the lab ends with its caller,
//! leaves no file behind, and runs no longer than its limit.
//!
//! ```text
//! caller ── Lab::run ──► emulated processor (lane) ── Debian kernel (host), kvm_amd or kvm_intel
//!    ▲                                                  └─ init.sh ── sh /lab/run
//!    └── stream.rs ◄──── one channel: the command's output, then a token and the status
//! ```

mod bochs;
mod death;
mod image;
mod iso;
pub mod microvm;
mod programs;
mod pty;
mod qemu;
mod screen;
mod session;
mod stream;
mod terminal;
mod tools;
mod turn;

use anyhow::{Context, Result, bail, ensure};
use session::{Ending, Limits, Machine};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A lab runs this long unless it is told otherwise: one minute less than many CI systems give a silent job.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(540);
/// The status of a command that reached its limit, as `timeout(1)` has it.
pub const TIMED_OUT: u8 = 124;

/// A machine that has said nothing for so long hangs: it gives a sign of life every 20 seconds, the first when it is up, which on the slower lane takes
/// 40 seconds of a machine that has nothing else to do.
const SILENCE: Duration = Duration::from_secs(240);

/// Which processor the lab emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// SVM with nested paging in QEMU's software CPU, and `kvm_amd`.
    Amd,
    /// VMX with EPT in Bochs, and `kvm_intel`. One CPU and 2 GiB, and a start takes three times as long.
    Intel,
}

impl std::str::FromStr for Lane {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Lane> {
        match name {
            "amd" => Ok(Lane::Amd),
            "intel" => Ok(Lane::Intel),
            _ => bail!("unknown lane \"{name}\", expected amd or intel"),
        }
    }
}

impl Lane {
    /// The KVM module that this processor needs.
    fn kvm_module(self) -> &'static str {
        match self {
            Lane::Amd => "kvm_amd",
            Lane::Intel => "kvm_intel",
        }
    }

    /// The kernel that the lab runs unless it is told otherwise. 6.1 unpacks itself fastest, which counts in Bochs.
    fn default_host(self) -> &'static str {
        match self {
            Lane::Amd => "6.12",
            Lane::Intel => "6.1",
        }
    }

    /// What a lab on this lane is made of besides the common initramfs.
    fn wiring(self, interactive: bool) -> image::Wiring {
        match self {
            Lane::Amd => qemu::wiring(interactive),
            Lane::Intel => bochs::wiring(),
        }
    }

    fn start(self, setup: &Setup) -> Result<Machine> {
        match self {
            Lane::Amd => qemu::start(setup),
            Lane::Intel => bochs::start(setup),
        }
    }
}

/// How a command in the lab ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabResult {
    /// The shell's exit status; [`TIMED_OUT`] if the limit came first.
    pub status: u8,
    /// Standard output and standard error, in the order they were written; what isn't UTF-8 is replaced.
    pub output: String,
    /// Whether the limit came first.
    pub timed_out: bool,
}

/// A lab to be: which processor, which kernel, how long, with what.
#[derive(Clone, Debug)]
pub struct Lab {
    lane: Lane,
    host: Option<String>,
    kvm_args: String,
    limit: Option<Duration>,
    extra: Option<PathBuf>,
    vmm: Option<PathBuf>,
}

/// What a lane is given to start a machine with.
#[derive(Debug)]
struct Setup {
    kernel: guest_kernels::StockKernel,
    /// Has no name: it goes when it is closed.
    initramfs: File,
    /// An ext4 image with the guest kernels and the tools.
    kernels: PathBuf,
    /// Has no name either; the machine's kernel and emulator write to it.
    log: File,
    interactive: bool,
}

impl Default for Lab {
    fn default() -> Lab {
        Lab::new()
    }
}

impl Lab {
    /// A lab on the AMD lane with that lane's usual kernel, [`DEFAULT_LIMIT`], and this workspace's `vmm`.
    pub fn new() -> Lab {
        Lab {
            lane: Lane::Amd,
            host: None,
            kvm_args: String::new(),
            limit: Some(DEFAULT_LIMIT),
            extra: None,
            vmm: None,
        }
    }

    /// On this processor.
    pub fn lane(mut self, lane: Lane) -> Lab {
        self.lane = lane;
        self
    }

    /// With this kernel of Debian's: `6.1`, `6.12` or `7.2`. Unless told, 6.12 on the AMD lane and 6.1 on the Intel lane.
    pub fn host(mut self, name: &str) -> Lab {
        self.host = Some(name.to_owned());
        self
    }

    /// With these parameters for the KVM module, `npt=0` for example: shadow paging.
    pub fn kvm_args(mut self, args: &str) -> Lab {
        args.clone_into(&mut self.kvm_args);
        self
    }

    /// For this long, the machine's start included but not the wait for other labs of this process; `None` for ever.
    pub fn limit(mut self, limit: impl Into<Option<Duration>>) -> Lab {
        self.limit = limit.into();
        self
    }

    /// With this directory's files at `/extra`.
    pub fn extra(mut self, dir: impl Into<PathBuf>) -> Lab {
        self.extra = Some(dir.into());
        self
    }

    /// With this static program as `vmm`, in place of the one that cargo builds from the workspace.
    pub fn vmm(mut self, program: impl Into<PathBuf>) -> Lab {
        self.vmm = Some(program.into());
        self
    }

    /// Runs a shell command in the lab and returns what it printed. If the lab's own kernel dies of a fault of the emulated processor, or hangs, that is
    /// said on standard error, and the command is run once more from the start.
    ///
    /// # Errors
    /// The lab could not be built, or its machine died before the command ended. A command that fails or takes too long
    /// is no error.
    pub fn run(&self, command: &str) -> Result<LabResult> {
        let mut output = Vec::new();
        let status = self.run_to(command, &mut output, |printed| printed.clear())?;
        let output = String::from_utf8_lossy(&output).into_owned();
        Ok(LabResult { status: status.unwrap_or(TIMED_OUT), output, timed_out: status.is_none() })
    }

    /// Runs a shell command in the lab, passes on what it prints as it comes, byte for byte, and returns its status. A
    /// command that reaches the limit is announced on standard error. One that is run once more, as by [`Lab::run`], has its output passed on
    /// once more too, after what it had printed before.
    ///
    /// # Errors
    /// As [`Lab::run`], or `output` fails.
    pub fn stream(&self, command: &str, output: &mut dyn Write) -> Result<u8> {
        let status = self.run_to(command, output, |_| ())?;
        Ok(status.unwrap_or_else(|| self.timed_out()))
    }

    /// An interactive shell on this terminal, and its status.
    ///
    /// # Errors
    /// Standard input or output is no terminal, or as [`Lab::run`].
    pub fn shell(&self) -> Result<u8> {
        let is_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        ensure!(is_terminal, "without a command the lab needs a terminal: give one with RUN='shell command'");
        let (setup, token) = self.setup(None)?;
        let mut machine = self.lane.start(&setup)?;
        let raw = terminal::Raw::enter()?;
        session::forward_stdin(std::mem::replace(&mut machine.input, Box::new(std::io::sink())));
        let ending = session::follow(machine, &token, self.limits(), &mut std::io::stdout())?;
        drop(raw);
        Ok(setup.status(ending)?.unwrap_or_else(|| self.timed_out()))
    }

    /// The status, or `None` when the limit came first. A machine that dies or hangs by a fault of its own is started once more: emulated
    /// processors have faults, seldom met twice. `again` is told before that.
    fn run_to<W: Write>(&self, command: &str, mut output: W, again: fn(&mut W)) -> Result<Option<u8>> {
        let (mut setup, token) = self.setup(Some(command))?;
        let _turn = turn::Turn::wait();
        let attempt = |setup: &Setup, output: &mut W| {
            let machine = self.lane.start(setup)?;
            session::follow(machine, &token, self.limits(), output)
        };
        let ending = attempt(&setup, &mut output)?;
        let Some(fault) = setup.fault(ending)? else { return setup.status(ending) };
        eprintln!(
            "lab: its own machine is gone, which no command can bring about ({fault}); once more from the start"
        );
        setup.log = new_log()?;
        again(&mut output);
        let ending = attempt(&setup, &mut output)?;
        setup.status(ending)
    }

    fn limits(&self) -> Limits {
        Limits { command: self.limit, silence: SILENCE }
    }

    fn timed_out(&self) -> u8 {
        let limit = self.limit.unwrap_or_default().as_secs();
        eprintln!("lab: the limit of {limit} seconds is reached; the lab is stopped");
        TIMED_OUT
    }

    /// Makes all that a machine needs, and the token that will end its output.
    fn setup(&self, command: Option<&str>) -> Result<(Setup, String)> {
        let kernel = guest_kernels::ensure(self.host.as_deref().unwrap_or(self.lane.default_host()))?;
        let token = stream::token()?;
        let programs = programs::Programs::build(self.vmm.clone())?;
        let contents = image::Contents {
            kernel: &kernel,
            wiring: self.lane.wiring(command.is_none()),
            kvm: (self.lane.kvm_module(), &self.kvm_args),
            token: &token,
            command,
            programs: &programs,
            extra: self.extra.as_deref(),
        };
        let initramfs = contents.initramfs()?;
        let log = new_log()?;
        let kernels = image::disk()?;
        Ok((Setup { kernel, initramfs, kernels, log, interactive: command.is_none() }, token))
    }
}

impl Setup {
    /// The command's status, `None` when the limit came first; a machine that died is an error with the log's end.
    fn status(&self, ending: Ending) -> Result<Option<u8>> {
        match ending {
            Ending::Exited(status) => Ok(Some(status)),
            Ending::TimedOut => Ok(None),
            Ending::Hung => bail!("{}", death::post_mortem(&hung(), &self.log()?)),
            Ending::Died(emulator) => {
                let seen = format!("its emulator ended with {emulator}");
                bail!("{}", death::post_mortem(&seen, &self.log()?));
            }
        }
    }

    /// The fault that a machine of its own has died of.
    fn fault(&self, ending: Ending) -> Result<Option<String>> {
        match ending {
            Ending::Exited(_) | Ending::TimedOut => Ok(None),
            Ending::Hung => Ok(Some(hung())),
            Ending::Died(emulator) => Ok(death::fault(emulator, &self.log()?).map(str::to_owned)),
        }
    }

    fn log(&self) -> Result<String> {
        let log = std::fs::read(open_path(&self.log)).context("cannot read the lab's log")?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }
}

fn new_log() -> Result<File> {
    tempfile::tempfile().context("cannot make a file for the lab's log")
}

fn hung() -> String {
    format!("no sign of life for {} seconds", SILENCE.as_secs())
}

/// A path by which another process opens a file of this one that has no name.
fn open_path(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc").join(format!("{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_lane_is_refused() {
        assert!("arm".parse::<Lane>().unwrap_err().to_string().contains("\"arm\", expected amd"));
    }
}
