//! `vmm upgrade`: another kernel under the processes of a guest.
//!
//! In: a VM, a kernel to boot. Out: the same processes on that kernel, and what it took; or a line that says why not. Holds: an upgrade
//! happens or it never happened. Until the disks are accepted the old kernel can go on as it was, and goes on if anything fails.
//!
//! ```text
//!  old  check ─────────────── pre-dump … dump ┐                                    resume, if anything failed
//!  new        boot beside, check              └ switch on trial · attach · restore · accept · resume … tidy
//! ```

mod hand;
mod report;

pub use report::{Phase, Report};

use crate::api::{
    Acceptance, BootRequest, Command, ForgetRequest, KeptKernel, KernelList, KernelStatus, Reply,
    SwitchRequest, SwitchSummary,
};
use crate::client::{self, ClientError};
use crate::exec::{self, ExecError};
use crate::signals::EndSignals;
use hand::{Hand, Said};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The VM's control socket.
    pub api: PathBuf,
    /// The new kernel.
    pub boot: BootRequest,
    /// A snapshot of it, booted and ready: taken if it is there, else made.
    pub ready: Option<PathBuf>,
    /// How many times what changes is written down before the processes stop.
    pub pre_dumps: u32,
    /// How long it may take to boot.
    pub boot_limit: Duration,
    /// How long any other phase may take.
    pub limit: Duration,
}

/// Why there was no upgrade.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The VM can't be asked, or refuses.
    #[error(transparent)]
    Api(#[from] ClientError),
    /// The VM has no vsock device.
    #[error(transparent)]
    Guest(#[from] ExecError),
    /// A phase failed.
    #[error("{phase}: {why}")]
    Phase {
        /// Which.
        phase: &'static str,
        /// Why.
        why: String,
    },
    /// The user has had enough.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
    /// Signals can't be held back.
    #[error("cannot hold back signals")]
    Signals(#[source] io::Error),
    /// The answer to another question.
    #[error("the VM's answer makes no sense")]
    Strange,
    /// It never happened.
    #[error("no upgrade, `{name}` goes on: {why}")]
    RolledBack {
        /// The old kernel.
        name: String,
        /// What failed.
        why: String,
    },
    /// Neither this nor that.
    #[error("{why}; and `{name}` does not go on by itself: {and}")]
    Stuck {
        /// The old kernel.
        name: String,
        /// What failed first.
        why: String,
        /// What failed then.
        and: String,
    },
    /// It has happened, but something is left to do.
    #[error("`{name}` has the processes, but {why}")]
    Almost {
        /// The new kernel.
        name: String,
        /// What is left.
        why: String,
    },
}

/// An upgrade under way.
struct Upgrade<'a> {
    wish: &'a Wish,
    signals: EndSignals,
    /// The old kernel.
    old: KernelStatus,
    /// The name of the new one, once it is beside.
    new: Option<String>,
    /// The agent of who is awake, by the VM's own vsock socket.
    hand: Hand,
    phases: Vec<Phase>,
}

/// Where the new kernel is.
enum Ready {
    Beside(KernelStatus),
    File(KeptKernel),
}

/// Says what would stand in the way: the old kernel is asked, and the new one, which boots beside it for that. Nothing is stopped.
///
/// # Errors
/// What stands in the way.
pub fn dry_run(wish: &Wish) -> Result<String, UpgradeError> {
    let mut upgrade = Upgrade::begin(wish)?;
    let ready = upgrade.check().and_then(|()| upgrade.make_ready());
    let ready = ready.and_then(|ready| upgrade.not_interrupted().map(|()| ready));
    let name = match ready {
        Ok(Ready::Beside(kernel)) => report::release(kernel.version.as_deref()),
        Ok(Ready::File(kept)) => format!("the kernel in {}", kept.path.display()),
        Err(error) => return Err(upgrade.not_begun(&error)),
    };
    upgrade.drop_beside();
    Ok(format!("nothing stands in the way of {} -> {name}", report::release(upgrade.old.version.as_deref())))
}

/// Does it.
///
/// # Errors
/// It never happened, and why; but see [`UpgradeError::Stuck`] and [`UpgradeError::Almost`].
pub fn run(wish: &Wish) -> Result<Report, UpgradeError> {
    let mut upgrade = Upgrade::begin(wish)?;
    let prepared = upgrade.check().and_then(|()| upgrade.make_ready()).and_then(|ready| {
        upgrade.pre_dump()?;
        upgrade.not_interrupted().map(|()| ready)
    });
    let ready = match prepared {
        Ok(ready) => ready,
        Err(error) => return Err(upgrade.not_begun(&error)),
    };
    let stopped = Instant::now();
    let moved = upgrade.dump().and_then(|()| upgrade.hand_over(ready)).and_then(|to| {
        upgrade.restore()?;
        upgrade.not_interrupted()?;
        upgrade.accept().map(|written| (to, written))
    });
    let (to, written_bytes) = match moved {
        Ok(moved) => moved,
        Err(error) => return Err(upgrade.back(&error)),
    };
    upgrade.release(&to)?;
    let downtime_ms = stopped.elapsed().as_secs_f64() * 1e3;
    upgrade.tidy(&to)?;
    upgrade.forget(&upgrade.old.name).map_err(|error| almost(&to, &error))?;
    let version = upgrade.kernels()?.kernels.first().and_then(|kernel| kernel.version.clone());
    let (from, to) = (report::release(upgrade.old.version.as_deref()), report::release(version.as_deref()));
    Ok(Report { from, to, phases: upgrade.phases, downtime_ms, written_bytes })
}

impl<'a> Upgrade<'a> {
    fn begin(wish: &'a Wish) -> Result<Self, UpgradeError> {
        // An upgrade is given up between its phases only, in order.
        let signals = EndSignals::hold().map_err(UpgradeError::Signals)?;
        let list = kernels(&wish.api)?;
        let old = list.kernels.into_iter().next().ok_or(UpgradeError::Strange)?;
        let hand = Hand::new(&exec::vsock_of(&wish.api)?);
        Ok(Self { wish, signals, old, new: None, hand, phases: Vec::new() })
    }

    fn not_interrupted(&self) -> Result<(), UpgradeError> {
        match self.signals.next().map_err(UpgradeError::Signals)? {
            Some(signal) => Err(UpgradeError::Interrupted(signal)),
            None => Ok(()),
        }
    }

    /// What would stand in the way in the old kernel.
    fn check(&mut self) -> Result<(), UpgradeError> {
        self.hand.ask("check", &[], self.wish.limit).map(drop)
    }

    /// Boots the new kernel beside, unless it was made ready before, and asks it too.
    fn make_ready(&mut self) -> Result<Ready, UpgradeError> {
        let (wish, share_disks) = (self.wish, true);
        let name = wish.boot.name.clone();
        if let Some(path) = wish.ready.as_ref().filter(|path| path.exists()) {
            return Ok(Ready::File(KeptKernel { path: path.clone(), name, share_disks }));
        }
        let boot = BootRequest { share_disks, image: None, ..wish.boot.clone() };
        let Reply::Prepared(kernel) = client::call(&wish.api, &Command::Prepare(boot))? else {
            return Err(UpgradeError::Strange);
        };
        self.new = Some(kernel.name.clone());
        let beside = Hand::new(kernel.vsock.as_deref().ok_or(ExecError::NoVsock)?);
        let took = beside.wait("boot", wish.boot_limit, || {
            self.not_interrupted().err().map(|error| error.to_string()).or_else(|| self.ended_beside())
        })?;
        self.phases.push(Phase::aside("boot", took));
        beside.ask("check", &[], wish.limit)?;
        let Some(path) = wish.ready.clone() else { return Ok(Ready::Beside(kernel)) };
        self.keep(&kernel, &path)?;
        Ok(Ready::File(KeptKernel { path, name, share_disks }))
    }

    /// For the next upgrades, and for this one.
    fn keep(&mut self, kernel: &KernelStatus, path: &Path) -> Result<(), UpgradeError> {
        let started = Instant::now();
        client::call(&self.wish.api, &client::snapshot_beside(path, &kernel.name)?)?;
        self.phases.push(Phase::aside("save", started.elapsed()));
        self.forget(&kernel.name)
    }

    fn ended_beside(&self) -> Option<String> {
        let list = self.kernels().ok()?;
        match list.kernels.into_iter().find(|kernel| kernel.beside) {
            Some(kernel) => kernel.ended,
            None => Some("it is gone".to_owned()),
        }
    }

    fn pre_dump(&mut self) -> Result<(), UpgradeError> {
        for _ in 0..self.wish.pre_dumps {
            self.not_interrupted()?;
            let said = self.hand.ask("pre-dump", &[], self.wish.limit)?;
            self.phases.push(Phase::aside("pre-dump", said.took).told(words(&said)));
        }
        Ok(())
    }

    fn dump(&mut self) -> Result<(), UpgradeError> {
        let said = self.hand.ask("dump", &[], self.wish.limit)?;
        self.phases.push(Phase::down("dump", said.took).told(words(&said)));
        self.not_interrupted()
    }

    /// Returns the name of the new kernel.
    fn hand_over(&mut self, ready: Ready) -> Result<String, UpgradeError> {
        let request = match ready {
            Ready::Beside(kernel) => SwitchRequest { to: Some(kernel.name), ..SwitchRequest::default() },
            Ready::File(kept) => SwitchRequest { snapshot: Some(kept), ..SwitchRequest::default() },
        };
        let started = Instant::now();
        let switched = self.switch(SwitchRequest { trial: true, ..request });
        let to = switched.map_err(|error| phase("switch", &error))?.to;
        let (wish, name) = (self.wish, to.clone());
        self.hand.wait("switch", wish.boot_limit, || match kernels(&wish.api) {
            Ok(list) => {
                list.kernels.first().filter(|kernel| kernel.name != name).map(|_| "it ended".to_owned())
            }
            Err(error) => Some(error.to_string()),
        })?;
        self.phases.push(Phase::down("switch", started.elapsed()));
        Ok(to)
    }

    fn restore(&mut self) -> Result<(), UpgradeError> {
        let said = self.hand.ask("attach", &[], self.wish.limit)?;
        self.phases.push(Phase::down("attach", said.took).told(words(&said)));
        self.not_interrupted()?;
        let said = self.hand.ask("restore", &["--hold"], self.wish.limit)?;
        self.phases.push(Phase::down("restore", said.took).told(words(&said)));
        Ok(())
    }

    fn accept(&mut self) -> Result<u64, UpgradeError> {
        let started = Instant::now();
        let accepted = client::call(&self.wish.api, &Command::Accept);
        let Reply::Accepted(Acceptance { written_bytes, .. }) =
            accepted.map_err(|error| phase("accept", &error.into()))?
        else {
            return Err(UpgradeError::Strange);
        };
        self.phases.push(Phase::down("accept", started.elapsed()));
        Ok(written_bytes)
    }

    /// From here on there is no way back, and none is needed.
    fn release(&mut self, to: &str) -> Result<(), UpgradeError> {
        let asked = self.hand.ask("resume", &["--keep"], self.wish.limit);
        let said = asked.map_err(|error| almost(to, &error))?;
        self.phases.push(Phase::down("resume", said.took));
        Ok(())
    }

    /// What was written down goes.
    fn tidy(&mut self, to: &str) -> Result<(), UpgradeError> {
        let asked = self.hand.ask("resume", &[], self.wish.limit);
        let said = asked.map_err(|error| almost(to, &error))?;
        self.phases.push(Phase::aside("tidy", said.took));
        Ok(())
    }

    /// Before anything was stopped.
    fn not_begun(&self, why: &UpgradeError) -> UpgradeError {
        self.drop_beside();
        UpgradeError::RolledBack { name: self.old.name.clone(), why: one_line(why) }
    }

    /// The old kernel is awake again, if it was not, and its processes go on.
    fn back(&mut self, why: &UpgradeError) -> UpgradeError {
        let (name, first) = (self.old.name.clone(), one_line(why));
        match self.take_back() {
            Ok(()) => UpgradeError::RolledBack { name, why: first },
            Err(error) => UpgradeError::Stuck { name, why: first, and: one_line(&error) },
        }
    }

    fn take_back(&mut self) -> Result<(), UpgradeError> {
        let awake = self.kernels()?.kernels.into_iter().next().ok_or(UpgradeError::Strange)?;
        if awake.name != self.old.name {
            let to = Some(self.old.name.clone());
            self.switch(SwitchRequest { to, ..SwitchRequest::default() })?;
        }
        self.drop_beside();
        self.hand.wait("resume", self.wish.limit, || None)?;
        self.hand.ask("resume", &[], self.wish.limit).map(drop)
    }

    /// One that sleeps without ever having been awake goes as well.
    fn drop_beside(&self) {
        let Ok(list) = self.kernels() else { return };
        let is_new = |kernel: &&KernelStatus| Some(&kernel.name) == self.new.as_ref();
        for kernel in list.kernels.iter().filter(is_new) {
            let _ = self.forget(&kernel.name);
        }
    }

    fn switch(&self, request: SwitchRequest) -> Result<SwitchSummary, UpgradeError> {
        match client::call(&self.wish.api, &Command::Switch(request))? {
            Reply::Switched(summary) => Ok(summary),
            _ => Err(UpgradeError::Strange),
        }
    }

    fn forget(&self, name: &str) -> Result<(), UpgradeError> {
        let request = ForgetRequest { name: name.to_owned() };
        client::call(&self.wish.api, &Command::Forget(request)).map(drop).map_err(Into::into)
    }

    fn kernels(&self) -> Result<KernelList, UpgradeError> {
        kernels(&self.wish.api)
    }
}

fn kernels(api: &Path) -> Result<KernelList, UpgradeError> {
    match client::call(api, &Command::Kernels)? {
        Reply::Kernels(list) => Ok(list),
        _ => Err(UpgradeError::Strange),
    }
}

fn phase(phase: &'static str, error: &UpgradeError) -> UpgradeError {
    UpgradeError::Phase { phase, why: one_line(error) }
}

fn almost(name: &str, error: &UpgradeError) -> UpgradeError {
    UpgradeError::Almost { name: name.to_owned(), why: one_line(error) }
}

fn one_line(error: &UpgradeError) -> String {
    crate::complaint::one_line(error)
}

/// What a guest told, for the table.
fn words(said: &Said) -> String {
    said.values.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}
