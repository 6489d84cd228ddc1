//! The whole life of a machine in this process.
//!
//! In: how it is made, and what its user cares for. Out: the process's exit status. Holds: signals that end the process are held back
//! before any thread is made; the machine's first vCPU has the process's first thread.

use anyhow::{Context, Result, anyhow};
use kvm_ioctls::Kvm;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use vmm::api_server::ApiServer;
use vmm::cli::Care;
use vmm::complaint;
use vmm::console_out::ConsoleOut;
use vmm::machine::Machine;
use vmm::monitor::{Calls, Inputs, Monitor};
use vmm::outcome::Outcome;
use vmm::restore::HostEnds;
use vmm::signals::EndSignals;
use vmm::switch::{Ends, Kernels};
use vmm::terminal::Terminal;
use vmm::vcpu_thread::{Place, Seat};
use vmm_sys_util::eventfd::EventFd;

/// Makes it, lets it run, waits for its end.
pub(crate) fn operate(
    kvm: Kvm,
    care: &Care,
    source: &Path,
    paused: bool,
    make: impl FnOnce(&Kvm, HostEnds) -> Result<Machine>,
) -> Result<ExitCode> {
    let signals = EndSignals::hold().context("cannot hold back signals")?;
    if let Some(wish) = &care.on_panic {
        wish.check()?;
    }
    let (server, calls) = serve(care)?;
    let drained = Arc::new(event()?);
    let again = drained.clone();
    let ends: Ends = Box::new(move || host_ends(again.clone()));
    let (seat, place) = Seat::here();
    let mut machine = make(&kvm, HostEnds { seat: Some(seat), ..ends() })?;
    let terminal = Terminal::open().context("cannot set up the terminal")?;
    if !paused {
        machine.run();
    }
    let kernels = Kernels::new(kvm, machine, source.to_owned(), ends);
    let inputs = Inputs { terminal, signals, calls, drained, on_panic: care.on_panic.clone() };
    let outcome = share(place, Monitor::new(kernels, inputs))?;
    drop(server);
    Ok(report(&outcome.context("cannot wait for the VM")?))
}

/// The first vCPU has this thread, and the monitor one of its own, which is made when the guest runs: on a host with no thread to give the VM
/// ends there. A first exit that takes long to be answered, by a disk that hangs, keeps the monitor waiting.
fn share(place: Place, monitor: Monitor) -> Result<io::Result<Outcome>> {
    let mut watching = None;
    let watch = || {
        let name = "monitor".to_owned();
        watching = Some(thread::Builder::new().name(name).spawn(move || monitor.run())?);
        Ok(())
    };
    place.live(watch).context("cannot start the monitor's thread")?;
    let watching = watching.context("the first vCPU has no thread any more")?;
    watching.join().map_err(|_| anyhow!("the monitor's thread panicked"))
}

/// The socket is there before the machine is: a path that can't be used is refused before anything else is done.
fn serve(care: &Care) -> Result<(Option<ApiServer>, Option<Calls>)> {
    let Some(path) = &care.socket else { return Ok((None, None)) };
    let (sender, receiver) = channel();
    let event = event()?;
    let wake = event.try_clone().context("cannot share an event")?;
    let server = ApiServer::start(path, sender, wake)?;
    let progress = server.progress();
    Ok((Some(server), Some(Calls { receiver, event, progress })))
}

fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("cannot make an event")
}

fn host_ends(drained: Arc<EventFd>) -> HostEnds {
    let wake = move || {
        let _ = drained.write(1);
    };
    HostEnds {
        console: Box::new(ConsoleOut::stdout()),
        drained: Box::new(wake),
        disks: Vec::new(),
        seat: None,
        alone: false,
    }
}

/// A power-off needs no words; everything else is said.
fn report(outcome: &Outcome) -> ExitCode {
    if *outcome != Outcome::PoweredOff {
        complaint::say(&format!("vmm: {outcome}"));
    }
    ExitCode::from(outcome.status())
}
