//! A machine: RAM, vCPUs, devices, and whether they run.
//!
//! In: run, pause, console input. Out: a [`PausedMachine`], the only thing that can be captured, and the reason why a
//! guest stopped. Holds: the parts drop in the order threads, devices, VM, RAM, so that nothing outlives what it uses.

use crate::board::Board;
use crate::config::Shape;
use crate::copy_ahead::{AheadError, Plan};
use crate::dirty_log::DirtyLog;
use crate::disk::{self, Disk, DisksError};
use crate::fault;
use crate::kvm::Ioctl;
use crate::ram::GuestRam;
use crate::run_loop::Stop;
use crate::soon;
use crate::timing::FirstRun;
use crate::vcpu::Vcpu;
use crate::vcpu_thread::{Report, VcpuThread};
use crate::vmcoreinfo::Place;
use devices::Generation;
use kvm_ioctls::VmFd;
use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// The threads of a machine's vCPUs, and what they have said.
pub(crate) struct Vcpus {
    pub(crate) threads: Vec<VcpuThread>,
    pub(crate) reports: Receiver<Report>,
    pub(crate) event: Arc<EventFd>,
    pub(crate) first_run: Arc<FirstRun>,
    pub(crate) alarm: Arc<OnceLock<String>>,
    pub(crate) running: usize,
    pub(crate) stop: Option<Stop>,
}

/// By which another thread says that the guest must not go on.
pub struct Alarm {
    why: Arc<OnceLock<String>>,
    event: Arc<EventFd>,
}

impl Alarm {
    /// Has the machine end with this message. The first reason counts.
    pub fn ring(&self, why: String) {
        self.why.get_or_init(|| why);
        let _ = self.event.write(1);
    }
}

/// A machine, running or paused.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    pub(crate) board: Board,
    /// What is written into RAM, if somebody wants to know.
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: GuestRam,
    pub(crate) disks: Vec<Disk>,
    pub(crate) vmcoreinfo: Place,
    pub(crate) shape: Shape,
    pub(crate) started: Instant,
    pub(crate) paused: bool,
    /// The generation id that the guest is given before it runs again, if it was kept and may have twins.
    pub(crate) generation: Option<Generation>,
    /// What is to be done once when the guest runs.
    pub(crate) when_run: Vec<Box<dyn FnOnce() + Send>>,
}

impl Machine {
    /// Stops every vCPU. The guest goes on when the value is dropped, unless the machine was paused before or
    /// [`PausedMachine::keep`] is called.
    pub fn pause(&mut self) -> PausedMachine<'_> {
        self.vcpus.pause();
        self.board.pause();
        let resume = !self.paused;
        self.paused = true;
        PausedMachine { machine: self, resume }
    }

    /// Lets the vCPUs run, unless the guest has stopped for good, and has done what is to be done then.
    pub fn resume(&mut self) {
        self.run();
        if !self.when_run.is_empty() {
            // Threads that are made now change the address space, and the guest's first page faults would sleep until they have.
            soon::see(|| self.vcpus.first_run.is_answered());
        }
        self.has_run();
    }

    /// Lets the vCPUs run. It is for the caller to say when they have, by [`Machine::has_run`].
    ///
    /// A restored guest becomes another only here: saved again before it has run, it is still the one that was kept.
    pub fn run(&mut self) {
        self.paused = false;
        if let Some(id) = self.generation.take()
            && let Err(error) = self.board.renew_generation(&id)
        {
            self.vcpus.fail(format!("cannot tell the guest that it was restored: {error}"));
        }
        if self.vcpus.stop.is_none() {
            self.board.run();
        }
        self.vcpus.run();
    }

    /// Has done what is to be done once when the guest runs.
    pub fn has_run(&mut self) {
        self.when_run.drain(..).for_each(|then| then());
    }

    /// Has `then` called when the guest has been let run for the first time. It must not wait for the guest.
    pub fn when_run(&mut self, then: impl FnOnce() + Send + 'static) {
        self.when_run.push(Box::new(then));
    }

    /// When its vCPUs first ran.
    pub fn first_run(&self) -> Arc<FirstRun> {
        self.vcpus.first_run.clone()
    }

    /// Whether the guest is held still.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Why the guest can't go on, if it can't.
    pub fn stop_reason(&mut self) -> Option<Stop> {
        self.vcpus.collect();
        self.vcpus.stop.clone()
    }

    /// Becomes readable when [`Machine::stop_reason`] has something to say.
    pub fn stop_event(&self) -> Arc<EventFd> {
        self.vcpus.event.clone()
    }

    /// For a thread that may find that the guest must not go on.
    pub fn alarm(&self) -> Alarm {
        Alarm { why: self.vcpus.alarm.clone(), event: self.vcpus.event.clone() }
    }

    /// Why part of its RAM is lost, if it is: it goes on from a snapshot that was shortened.
    pub fn lost_ram(&self) -> Option<&'static str> {
        self.ram.lost()
    }

    /// From now on it is watched who writes RAM, so that a snapshot can be a difference to another that was written in the meantime. The
    /// guest may run.
    ///
    /// # Errors
    /// The failed call.
    pub fn track(&mut self) -> Result<(), Ioctl> {
        if self.log.is_none() {
            self.log = Some(Arc::new(DirtyLog::start(&self.vm, &self.ram)?));
        }
        Ok(())
    }

    /// Notes what was written into RAM until now; `false` if nobody watches. The guest may run, and the next time has the less to do.
    ///
    /// # Errors
    /// The failed call. Nothing is known of changes then.
    pub fn note_written(&self) -> Result<bool, Ioctl> {
        self.log.as_ref().map_or(Ok(false), |log| log.note().map(|()| true))
    }

    /// What RAM can be copied by before the guest stands still for a live snapshot, if it runs, and that is worth it.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub fn copy_ahead(&self) -> Result<Option<Plan>, AheadError> {
        if self.paused { Ok(None) } else { Plan::of(&self.ram, &self.vm, self.log.clone()) }
    }

    /// The devices.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// What kind of machine this is.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the guest's kernel tells debuggers about itself, if it is Linux and has come so far. Asked for before a pause, it is there
    /// at once in the pause.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn vmcoreinfo(&self) -> io::Result<Option<Vec<u8>>> {
        self.vmcoreinfo.look(&self.ram, &self.shape)
    }

    /// The same, if it was found before and still is there.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn vmcoreinfo_at_once(&self) -> io::Result<Option<Vec<u8>>> {
        self.vmcoreinfo.look_again(&self.ram)
    }

    /// Makes durable what the guest has written to its disks. It may run meanwhile.
    ///
    /// # Errors
    /// The disk that failed.
    pub fn sync_disks(&self) -> Result<(), DisksError> {
        disk::sync(&self.disks)
    }

    /// Takes the machine apart: its threads end, its devices let go of the host, its VM is closed. What is left is its RAM, and its
    /// disks, open and locked as they were.
    pub fn dismantle(self) -> (GuestRam, Vec<Disk>) {
        let Self { vcpus, board, log, vm, ram, disks, .. } = self;
        drop(vcpus);
        drop(board);
        drop(log);
        // KVM takes the longer to take a VM apart the more RAM its guest has touched. The host's ends are free by now, so nobody
        // need wait for it; the mapping stays until it is done.
        let mapping = ram.clone();
        let take_apart = move || {
            drop(vm);
            drop(mapping);
        };
        // Without a thread it is done here and now, as the closure is dropped.
        drop(std::thread::Builder::new().name("vm end".to_owned()).spawn(take_apart));
        (ram, disks)
    }

    /// When this process made it.
    pub fn started(&self) -> Instant {
        self.started
    }
}

/// A machine whose vCPUs all stand still.
pub struct PausedMachine<'a> {
    machine: &'a mut Machine,
    resume: bool,
}

impl PausedMachine<'_> {
    /// Lets the machine stay paused.
    pub fn keep(mut self) {
        self.resume = false;
    }

    /// Lets the guest go on, whether or not it was running before.
    pub fn resume(mut self) {
        self.resume = true;
    }

    pub(crate) fn machine(&self) -> &Machine {
        self.machine
    }

    /// Whether the guest has asked for its end, so that there is nothing to go on with.
    pub fn has_ended(&self) -> bool {
        self.machine.vcpus.stop.is_some()
    }

    /// A line for each vCPU that says where it stands. One whose registers can't be read has none.
    pub fn places(&self) -> Vec<String> {
        let place = |(index, vcpu): (usize, MutexGuard<'_, Vcpu>)| {
            Some(fault::place(index, &vcpu.fd.get_regs().ok()?, &vcpu.fd.get_sregs().ok()?))
        };
        self.vcpus().enumerate().filter_map(place).collect()
    }

    /// The machine's RAM, which nobody writes now.
    pub fn ram(&self) -> &GuestRam {
        &self.machine.ram
    }

    pub(crate) fn vcpus(&self) -> impl Iterator<Item = MutexGuard<'_, Vcpu>> {
        self.machine.vcpus.threads.iter().map(VcpuThread::vcpu)
    }
}

impl Drop for PausedMachine<'_> {
    fn drop(&mut self) {
        if self.resume {
            self.machine.resume();
        }
    }
}

impl Vcpus {
    fn run(&mut self) {
        if self.running > 0 || self.stop.is_some() {
            return;
        }
        for thread in &self.threads {
            thread.vcpu().tell_was_stopped();
            thread.run();
        }
        self.running = self.threads.len();
    }

    fn pause(&mut self) {
        if self.running > 0 {
            self.threads.iter().for_each(VcpuThread::kick);
        }
        while self.running > 0 {
            match self.reports.recv() {
                Ok(report) => self.note(report),
                Err(_) => self.running = 0,
            }
        }
    }

    /// Has the machine end with this message instead of running.
    fn fail(&mut self, message: String) {
        self.stop.get_or_insert(Stop::Fault(message));
        let _ = self.event.write(1);
    }

    fn collect(&mut self) {
        while let Ok(report) = self.reports.try_recv() {
            self.note(report);
        }
        self.stop = self.stop.take().or_else(|| self.alarm.get().cloned().map(Stop::Fault));
    }

    /// The first reason counts.
    fn note(&mut self, report: Report) {
        self.running -= 1;
        self.stop = self.stop.take().or(report);
    }
}
