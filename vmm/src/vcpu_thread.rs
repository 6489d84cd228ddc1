//! A vCPU's thread: paused or running.
//!
//! In: run, a kick. Out: one report each time it stops. Holds: while it is paused, its vCPU is free for others to save;
//! it keeps the same thread for life, its own or the process's first, because KVM waits for an RCU grace period when a vCPU changes threads.

mod seat;

use crate::run_loop::{self, Buses, Step, Stop};
use crate::soon;
use crate::timing::FirstRun;
use crate::vcpu::Vcpu;
pub use seat::{Place, Seat};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// What a thread says when it stops: nothing for a pause that was asked for, or why the guest can't go on.
pub type Report = Option<Stop>;

/// The machine's end of a vCPU's thread.
pub struct VcpuThread {
    vcpu: Arc<Mutex<Vcpu>>,
    pause: Arc<AtomicBool>,
    run: Option<Sender<()>>,
    thread: seat::Thread,
}

/// Where the threads' reports go: a channel, and an event for those that nobody asked for.
#[derive(Clone)]
pub struct Reports {
    /// Takes each report.
    pub sender: Sender<Report>,
    /// Written when a report has a reason to stop.
    pub event: Arc<EventFd>,
    /// Told when the first of the threads runs its guest.
    pub first_run: Arc<FirstRun>,
}

impl VcpuThread {
    /// Gives the thread its vCPU. It is paused.
    pub fn new(seat: Seat, vcpu: Vcpu, buses: Buses, reports: Reports) -> Self {
        let vcpu = Arc::new(Mutex::new(vcpu));
        let pause = Arc::new(AtomicBool::new(false));
        let (run, commands) = channel();
        let body = Body { vcpu: vcpu.clone(), pause: pause.clone(), commands, buses, reports };
        Self { vcpu, pause, run: Some(run), thread: seat.take(body) }
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        self.pause.store(false, Ordering::SeqCst);
        if let Some(run) = &self.run {
            // It fails only when the thread has ended, which it does only when `run` is dropped.
            let _ = run.send(());
        }
    }

    /// Asks the vCPU to stop; its report follows.
    pub fn kick(&self) {
        self.pause.store(true, Ordering::SeqCst);
        self.thread.kick();
    }

    /// The vCPU, once its thread has paused.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        lock(&self.vcpu)
    }
}

/// The thread is the vCPU's no longer when its handle is gone.
impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.run = None;
        self.kick();
        self.thread.wait();
    }
}

enum State {
    Paused,
    Running,
    Ended,
}

struct Body {
    vcpu: Arc<Mutex<Vcpu>>,
    pause: Arc<AtomicBool>,
    commands: Receiver<()>,
    buses: Buses,
    reports: Reports,
}

impl Body {
    /// Is the vCPU until it is let go of; `first` is what the calling thread does with it before anything else.
    fn live(self, first: impl FnOnce(&Self) -> State) {
        let _bound = lock(&self.vcpu).bind_to_thread();
        let mut state = first(&self);
        loop {
            state = match state {
                State::Paused => self.paused(),
                State::Running => self.running(),
                State::Ended => break,
            };
        }
    }

    /// Lets its guest run until its first exit or a kick, if it has been told to. Whoever kicks is made last: a kick that came before the
    /// flag is read would be forgotten, and leave no other trace. Without one the guest has to wait.
    fn first_step<T>(&self, kicker: impl FnOnce() -> io::Result<T>) -> State {
        self.reports.first_run.sit();
        if self.commands.try_recv().is_err() {
            return State::Paused;
        }
        let mut vcpu = lock(&self.vcpu);
        if self.told_to_pause(&mut vcpu) {
            return State::Running;
        }
        let Ok(_kicker) = kicker() else { return State::Running };
        match self.step(&mut vcpu) {
            Step::Continue | Step::Interrupted => State::Running,
            Step::Stop(stop) => self.stopped(vcpu, Some(stop)),
        }
    }

    fn paused(&self) -> State {
        if soon::recv(&self.commands).is_ok() { State::Running } else { State::Ended }
    }

    fn running(&self) -> State {
        let mut vcpu = lock(&self.vcpu);
        let report = self.run_guest(&mut vcpu);
        self.stopped(vcpu, report)
    }

    fn stopped(&self, mut vcpu: MutexGuard<'_, Vcpu>, report: Report) -> State {
        let report = report.or(self.settle(&mut vcpu));
        drop(vcpu);
        self.report(report);
        State::Paused
    }

    /// Looks at the flag before the first `KVM_RUN` as well: a kick that came before the vCPU was bound to this thread
    /// has left no other trace.
    fn run_guest(&self, vcpu: &mut Vcpu) -> Report {
        while !self.told_to_pause(vcpu) {
            if let Some(stop) = self.run_until_interrupted(vcpu) {
                return Some(stop);
            }
        }
        None
    }

    fn run_until_interrupted(&self, vcpu: &mut Vcpu) -> Report {
        loop {
            match self.step(vcpu) {
                Step::Continue => {}
                Step::Interrupted => return None,
                Step::Stop(stop) => return Some(stop),
            }
        }
    }

    fn step(&self, vcpu: &mut Vcpu) -> Step {
        self.reports.first_run.enter();
        let stepped = run_loop::step(vcpu, &self.buses);
        if !matches!(stepped, Step::Interrupted) {
            self.reports.first_run.answer();
        }
        stepped
    }

    /// Finishes the instruction whose exit was answered last: until then the answer to a read is not in the guest's
    /// registers. That may take further exits, as for a string instruction.
    fn settle(&self, vcpu: &mut Vcpu) -> Report {
        let report = loop {
            vcpu.kick_self();
            match run_loop::step(vcpu, &self.buses) {
                Step::Continue => {}
                Step::Interrupted => break None,
                Step::Stop(stop) => break Some(stop),
            }
        };
        vcpu.clear_kick();
        report
    }

    /// The kick is forgotten before the flag is read: one that comes in between is seen here, one that comes later stops
    /// the next `KVM_RUN`.
    fn told_to_pause(&self, vcpu: &mut Vcpu) -> bool {
        vcpu.clear_kick();
        // The handler runs on this thread: only the compiler could swap the two.
        compiler_fence(Ordering::SeqCst);
        self.pause.load(Ordering::SeqCst)
    }

    fn report(&self, report: Report) {
        let unasked = report.is_some();
        // Nobody listens any more when the machine is being dropped.
        let _ = self.reports.sender.send(report);
        if unasked {
            let _ = self.reports.event.write(1);
        }
    }
}

/// A thread that panics reports as well, or a pause would wait for it for ever.
impl Drop for Body {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.report(Some(Stop::Fault("the thread of a vCPU panicked".to_owned())));
        }
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}
