//! The monitor's thread: waits for the user, the API and the vCPUs, and answers each.
//!
//! In: typed bytes, API calls, signals, the vCPUs' reports. Out: the VM's [`Outcome`]. Holds: the machine is this thread's
//! alone, so no command meets another; while a snapshot is written the others wait.
//!
//! `poll(2)` rather than epoll, because standard input may be a regular file or `/dev/null`, which epoll refuses.

mod kernels;
mod live;

use crate::api::{
    ApiCall, ApiError, BalloonRequest, BalloonStatus, Command, DumpRequest, NetworkStatus, Reply, RunState,
    SnapshotRequest, SnapshotSummary, Status, Then,
};
use crate::complaint;
use crate::disk::DiskCare;
use crate::live::{GettingReady, LiveSnapshot};
use crate::load;
use crate::machine::{Machine, PausedMachine};
use crate::outcome::Outcome;
use crate::panic_dump::OnPanic;
use crate::progress::Progress;
use crate::run_loop::Stop;
use crate::save::{SaveError, Wish};
use crate::signals::EndSignals;
use crate::switch::{Kernels, SwitchError};
use crate::tap::TapName;
use crate::terminal::{Action, HELP, Terminal};
use devices::Request;
use devices::virtio::Mac;
use live::Asked;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use snapshot::{SealKey, Summary};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Calls from the API's server, and the event that says there is one.
pub struct Calls {
    /// The calls.
    pub receiver: Receiver<ApiCall>,
    /// Written after each is sent.
    pub event: EventFd,
    /// Where the server looks when it is asked how far a snapshot has got.
    pub progress: Progress,
}

/// What the monitor listens to besides the machine.
pub struct Inputs {
    /// The guest's console.
    pub terminal: Terminal,
    /// Signals that end the process.
    pub signals: EndSignals,
    /// The API, if there is one.
    pub calls: Option<Calls>,
    /// Written when the guest has read all its console input.
    pub drained: Arc<EventFd>,
    /// What is to be done when a guest's kernel panics.
    pub on_panic: Option<OnPanic>,
}

/// The monitor's loop.
pub struct Monitor {
    kernels: Kernels,
    inputs: Inputs,
    ended: Option<Outcome>,
    /// The live snapshot that was begun last.
    live: Option<LiveSnapshot>,
    /// One for which RAM is copied ahead.
    asked: Option<(Asked, GettingReady)>,
}

/// How often a guest that takes no input is asked again: leaving loopback mode announces itself by nothing, nor does a
/// vCPU that is done with the port.
const CONSOLE_RETRY: Duration = Duration::from_millis(20);

impl Monitor {
    /// A loop around the kernels.
    pub fn new(kernels: Kernels, inputs: Inputs) -> Self {
        Self { kernels, inputs, ended: None, live: None, asked: None }
    }

    /// Waits until the VM ends.
    ///
    /// # Errors
    /// The host won't let it wait or read.
    pub fn run(mut self) -> io::Result<Outcome> {
        let machine = self.kernels.machine();
        if !machine.is_paused() {
            machine.has_run();
        }
        loop {
            self.feed_console();
            self.wait()?;
            self.hear_signals()?;
            self.hear_vcpus();
            self.hear_beside();
            if self.ended.is_none() {
                self.hear_user()?;
            }
            self.hear_api();
            if self.ended.is_none() {
                self.hear_ready();
            }
            if let Some(outcome) = self.ended.take() {
                self.settle(&outcome)?;
                return Ok(outcome);
            }
        }
    }

    /// A live snapshot of a guest that has ended by itself is finished, unless a signal comes; one of a VM that was told to end is not.
    fn settle(&mut self, outcome: &Outcome) -> io::Result<()> {
        // Whoever waits for it is told that the VM is ending.
        self.asked = None;
        let Some(live) = self.live.take() else { return Ok(()) };
        let mut told = matches!(outcome, Outcome::Stopped | Outcome::Signal(_));
        while !told && !live.is_done() {
            wait_for(&[self.inputs.signals.fd()], Some(CONSOLE_RETRY))?;
            told = self.inputs.signals.next()?.is_some();
        }
        live.cancel();
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let stop = self.kernels.awake().stop_event();
        let mut fds = vec![self.inputs.signals.fd(), stop.as_raw_fd(), self.inputs.drained.as_raw_fd()];
        let beside = self.kernels.beside_event();
        let ready = self.asked.as_ref().map(|(_, ready)| ready.event());
        fds.extend(ready.as_ref().map(|ready| ready.as_raw_fd()));
        fds.extend(beside.as_ref().map(AsRawFd::as_raw_fd));
        fds.extend(self.inputs.terminal.fd());
        fds.extend(self.inputs.calls.as_ref().map(|calls| calls.event.as_raw_fd()));
        let timeout = self.inputs.terminal.has_bytes().then_some(CONSOLE_RETRY);
        wait_for(&fds, timeout)
    }

    fn hear_signals(&mut self) -> io::Result<()> {
        if let Some(signal) = self.inputs.signals.next()? {
            self.end(Outcome::Signal(signal));
        }
        Ok(())
    }

    fn hear_vcpus(&mut self) {
        let machine = self.kernels.machine();
        let _ = machine.stop_event().read();
        if let Some(stop) = machine.stop_reason() {
            let restart = stop == Stop::Guest(Request::Restart);
            let outcome = Outcome::of(stop, machine.board().panic_seen());
            let outcome = outcome.at(|| machine.pause().places()).unless(machine.lost_ram());
            if let (Outcome::Panicked, Some(wish)) = (&outcome, &self.inputs.on_panic) {
                let line = wish.dump(machine);
                self.say(&line);
            }
            match outcome {
                Outcome::GaveUp if restart => self.restart(),
                Outcome::PoweredOff if self.kernels.is_image_kernel() => self.end_with_image(),
                outcome => self.end_kernel(outcome),
            }
        }
    }

    /// A kernel that ends leaves the machine to the one that fell asleep last.
    fn end_kernel(&mut self, outcome: Outcome) {
        let Some(next) = self.kernels.last_asleep() else { return self.end(outcome) };
        let name = self.kernels.origin().0.to_owned();
        if let Some(pause) = self.replace_ended(&outcome) {
            let ms = milliseconds(pause);
            self.say(&format!(
                "vmm: `{next}` goes on after {ms:.1} ms in place of kernel `{name}`: {outcome}"
            ));
        }
    }

    /// How long nobody ran; none if the VM ends.
    fn replace_ended(&mut self, outcome: &Outcome) -> Option<Duration> {
        let replaced = self.kernels.replace_ended();
        replaced
            .map_err(|error| {
                self.say(&format!("vmm: {}", complaint::one_line(&error)));
                self.end(outcome.clone());
            })
            .ok()
    }

    /// An image kernel that powers off ends the VM: what it wrote is what is left of the one that sleeps. If it wrote nothing, or that
    /// is not whole, the one that sleeps goes on.
    fn end_with_image(&mut self) {
        match self.kernels.finish_image() {
            Ok(None) => self.end_kernel(Outcome::PoweredOff),
            Ok(Some(path)) => {
                self.say(&complaint::printable(&format!("vmm: {} is whole", path.display())));
                self.end(Outcome::PoweredOff);
            }
            Err(error) => {
                self.say(&format!("vmm: {}", complaint::one_line(&error)));
                self.end_kernel(Outcome::PoweredOff);
            }
        }
    }

    /// The restore stub takes over; if it says no, the one that sleeps goes on.
    fn restart(&mut self) {
        match self.kernels.restart() {
            Ok(said) => self.say(&complaint::printable(&said)),
            Err(error) => {
                self.say(&format!("vmm: {}", complaint::one_line(&error)));
                self.replace_ended(&Outcome::GaveUp);
            }
        }
    }

    fn hear_user(&mut self) -> io::Result<()> {
        let _ = self.inputs.drained.read();
        for action in self.inputs.terminal.read()? {
            match action {
                Action::End => self.end(Outcome::Stopped),
                Action::Status => self.say(&self.status().to_string()),
                Action::Help => self.say(HELP),
            }
        }
        Ok(())
    }

    fn feed_console(&mut self) {
        let terminal = &mut self.inputs.terminal;
        if terminal.has_bytes() {
            self.kernels.awake().board().feed_console(|room| terminal.take(room));
        }
    }

    /// On a terminal in raw mode a line needs its carriage return.
    fn say(&self, text: &str) {
        complaint::say(&format!("\r\n{}\r", text.replace('\n', "\r\n")));
    }

    fn hear_api(&mut self) {
        let Some(calls) = &self.inputs.calls else { return };
        let _ = calls.event.read();
        let waiting: Vec<_> = calls.receiver.try_iter().collect();
        for ApiCall { command, reply } in waiting {
            let answer = match command {
                _ if self.ended.is_some() => Err(ApiError::ending()),
                Command::Snapshot(request) if request.live => {
                    match self.snapshot_live(request, reply.clone()) {
                        Ok(()) => continue,
                        Err(error) => Err(error),
                    }
                }
                command => self.answer(command),
            };
            // It fails when the caller has gone.
            let _ = reply.send(answer);
        }
    }

    fn answer(&mut self, command: Command) -> Result<Reply, ApiError> {
        match command {
            Command::Status => return Ok(Reply::Status(self.status())),
            Command::Progress => return Ok(Reply::Progress(self.progress().now())),
            Command::Pause => self.kernels.machine().pause().keep(),
            Command::Resume => self.kernels.machine().resume(),
            Command::Stop(request) if request.all => self.end(Outcome::Stopped),
            Command::Stop(_) => self.end_kernel(Outcome::Stopped),
            Command::Balloon(request) => return self.balloon(request),
            Command::Switch(request) => return self.switch(request).map(Reply::Switched),
            Command::Prepare(boot) => return self.prepare(boot).map(Reply::Prepared),
            Command::Accept => return self.accept().map(Reply::Accepted),
            Command::Kernels => return Ok(Reply::Kernels(self.kernel_list())),
            Command::Forget(request) => self.kernels.forget(&request.name).map_err(|e| conflict(&e))?,
            Command::Snapshot(request) => return self.snapshot(request).map(Reply::Snapshot),
            Command::Dump(request) => return self.dump(request).map(Reply::Snapshot),
        }
        Ok(Reply::Done)
    }

    fn balloon(&self, request: BalloonRequest) -> Result<Reply, ApiError> {
        let memory = self.kernels.awake().shape().memory;
        if request.target_bytes > memory {
            return Err(ApiError::bad_request(format!(
                "a balloon of {} bytes: the guest has {memory} bytes of RAM",
                request.target_bytes
            )));
        }
        match self.kernels.awake().board().virtio().set_balloon(request.target_bytes) {
            true => Ok(Reply::Done),
            false => Err(ApiError::conflict("this VM has no balloon: start it with --balloon")),
        }
    }

    /// Where what a snapshot has done is noted; nobody looks there without an API.
    fn progress(&self) -> Progress {
        self.inputs.calls.as_ref().map_or_else(Progress::default, |calls| calls.progress.clone())
    }

    fn snapshot(&mut self, request: SnapshotRequest) -> Result<SnapshotSummary, ApiError> {
        if let Some(name) = &request.kernel {
            return self.snapshot_beside(name, request.path);
        }
        // Nor may it begin to watch who writes RAM, while that is watched to copy it ahead.
        self.expect_no_live()?;
        self.kernels.check_can_be_kept().map_err(|error| conflict(&error))?;
        let (wish, progress) = (wish(&request)?, self.progress());
        watch(self.kernels.machine(), request.track)?;
        self.write(request.path, request.then, |paused, _| {
            let saved = paused.save(wish, &mut |done, total| progress.note(done, total));
            progress.end();
            saved
        })
    }

    /// The guest does afterwards what it did before.
    fn dump(&mut self, request: DumpRequest) -> Result<SnapshotSummary, ApiError> {
        self.write(request.path, None, |paused, path| paused.dump(path))
    }

    fn write(
        &mut self,
        path: PathBuf,
        then: Option<Then>,
        write: impl FnOnce(&PausedMachine<'_>, &Path) -> Result<Summary, SaveError>,
    ) -> Result<SnapshotSummary, ApiError> {
        self.expect_no_live()?;
        let started = Instant::now();
        let machine = self.kernels.machine();
        // The first look for it goes through all RAM, which need not be done in the pause.
        let _ = machine.vmcoreinfo();
        let paused = machine.pause();
        if paused.has_ended() {
            return Err(ApiError::ending());
        }
        let saved = write(&paused, &path).map_err(|error| failed(&error))?;
        match then {
            None => drop(paused),
            Some(Then::Pause | Then::Stop) => paused.keep(),
            Some(Then::Resume) => paused.resume(),
        }
        let total = started.elapsed();
        let stands_still = self.kernels.awake().is_paused();
        if then == Some(Then::Stop) {
            self.end_kernel(Outcome::Stopped);
        }
        Ok(summary(path, &saved, (!stands_still).then_some(total), total))
    }

    fn status(&self) -> Status {
        let machine = self.kernels.awake();
        let shape = machine.shape();
        Status {
            name: shape.name.clone(),
            state: if machine.is_paused() { RunState::Paused } else { RunState::Running },
            vcpus: shape.vcpus,
            memory_bytes: shape.memory,
            kernel: shape.kernel.version.clone(),
            started_from: self.kernels.origin().1.clone(),
            balloon: self.balloon_status(),
            uptime_seconds: machine.started().elapsed().as_secs_f64(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vsock: machine.board().vsock_path().map(Into::into),
            networks: self.network_status(),
        }
    }

    fn network_status(&self) -> Vec<NetworkStatus> {
        let networks = self.kernels.awake().board().virtio().networks().into_iter();
        let status = |(id, tap, mac): (&str, &TapName, Mac)| NetworkStatus {
            id: id.to_owned(),
            tap: tap.place(),
            mac: mac.to_string(),
        };
        networks.map(status).collect()
    }

    fn balloon_status(&self) -> Option<BalloonStatus> {
        let (target_bytes, actual_bytes) = self.kernels.awake().board().virtio().balloon_sizes()?;
        Some(BalloonStatus { target_bytes, actual_bytes })
    }

    /// The first reason to end is the one that counts.
    fn end(&mut self, outcome: Outcome) {
        self.ended.get_or_insert(outcome);
    }
}

fn wait_for(fds: &[RawFd], timeout: Option<Duration>) -> io::Result<()> {
    // SAFETY: each fd belongs to a part of the monitor, which is borrowed by the caller throughout.
    let borrowed = fds.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) });
    let mut polled: Vec<_> = borrowed.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    let timeout =
        timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The parent is opened, with all that it needs, before the guest has to stand still.
fn wish(request: &SnapshotRequest) -> Result<Wish, ApiError> {
    let care = DiskCare { keep: request.with_disks, digest: request.digest_disks, at_once: request.live };
    let key = request.key.as_deref().map(SealKey::read).transpose().map_err(refused)?;
    let wish = Wish::new(&request.path, care).sealed_with(key.clone());
    let Some(parent) = &request.parent else { return Ok(wish) };
    let chain = load::open_own_chain(parent, key.as_ref()).map_err(refused)?;
    wish.since(&chain).map_err(refused)
}

/// What can be done before the guest has to stand still, for a snapshot that others may be differences to.
fn watch(machine: &mut Machine, track: bool) -> Result<(), ApiError> {
    if track {
        machine.track().map_err(|error| failed(&error))?;
    }
    machine.note_written().map(drop).map_err(|error| failed(&error))
}

fn refused(error: impl std::error::Error + 'static) -> ApiError {
    ApiError::conflict(complaint::one_line(&error))
}

fn summary(path: PathBuf, saved: &Summary, pause: Option<Duration>, total: Duration) -> SnapshotSummary {
    SnapshotSummary {
        path,
        memory_bytes: saved.ram_bytes,
        stored_bytes: saved.data_bytes,
        vmcoreinfo: saved.vmcoreinfo,
        pause_ms: pause.map(milliseconds),
        total_ms: milliseconds(total),
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::failed(complaint::one_line(error))
}

fn conflict(error: &SwitchError) -> ApiError {
    ApiError::conflict(complaint::one_line(error))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
