//! Live snapshots, from when they are asked for until they are written behind the guest.
//!
//! In: a request. Out: a snapshot under way, of which its own thread tells the end. Holds: of the RAM of a restored guest most is copied while it runs and
//! the monitor listens to everybody else; what fails there only makes the guest stand still for longer.

use super::{Monitor, conflict, failed, summary, watch, wish};
use crate::api::{ApiError, Reply, SnapshotRequest};
use crate::complaint;
use crate::copy_ahead::{AheadError, CopiedAhead};
use crate::disk;
use crate::live::{GettingReady, LiveSnapshot};
use crate::save::{SaveError, Wish};
use kvm_ioctls::VmFd;
use snapshot::Summary;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

/// A live snapshot that somebody waits for.
pub(super) struct Asked {
    /// The machine that is to be saved, as no other has it.
    of: Arc<VmFd>,
    request: SnapshotRequest,
    wish: Wish,
    reply: Sender<Result<Reply, ApiError>>,
    started: Instant,
}

impl Monitor {
    /// While a live snapshot is written the machine makes no other, nor gives way to another kernel.
    pub(super) fn expect_no_live(&self) -> Result<(), ApiError> {
        let written = self.live.as_ref().filter(|live| !live.is_done()).map(LiveSnapshot::path);
        let asked = self.asked.as_ref().map(|(asked, _)| &*asked.request.path);
        match written.or(asked) {
            Some(path) => Err(ApiError::conflict(format!(
                "a live snapshot is being written to {}: try again when it is done",
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Answers once the file is there; until then the guest runs.
    pub(super) fn snapshot_live(
        &mut self,
        request: SnapshotRequest,
        reply: Sender<Result<Reply, ApiError>>,
    ) -> Result<(), ApiError> {
        self.expect_no_live()?;
        self.kernels.check_can_be_kept().map_err(|error| conflict(&error))?;
        let wish = wish(&request)?;
        if let Some(last) = self.live.take() {
            last.cancel();
        }
        let machine = self.kernels.machine();
        // Where it is: there is no time to look for it in the pause. Without it the snapshot is one all the same.
        let _ = machine.vmcoreinfo();
        watch(machine, request.track)?;
        let asked = Asked { of: machine.vm.clone(), request, wish, reply, started: Instant::now() };
        match self.get_ready() {
            Some(ready) => self.asked = Some((asked, ready)),
            None => {
                // What is written to the disks by now need not be waited for when the guest stands still.
                self.kernels.awake().sync_disks().map_err(|error| failed(&error))?;
                self.freeze(asked, None)?;
            }
        }
        Ok(())
    }

    /// None if it is not worth it, or can't be.
    fn get_ready(&self) -> Option<GettingReady> {
        let machine = self.kernels.awake();
        let disks = machine.disks.clone();
        // What fails is told when they are synced once more, in the pause.
        let sync = move || drop(disk::sync(&disks));
        let plan = self.or_say(machine.copy_ahead())??;
        self.or_say(GettingReady::begin(plan, sync).map_err(AheadError::from))
    }

    fn or_say<T>(&self, ahead: Result<T, AheadError>) -> Option<T> {
        ahead.inspect_err(|error| self.say_not_ahead(error)).ok()
    }

    fn say_not_ahead(&self, error: &AheadError) {
        self.say(&format!("vmm: RAM is not copied ahead: {}", complaint::one_line(error)));
    }

    /// Has the guest stand still if all but the last of its RAM is copied; or gives it up, if the guest has ended and another is in its place.
    pub(super) fn hear_ready(&mut self) {
        let awake = self.kernels.awake().vm.clone();
        if let Some((asked, _)) = self.asked.take_if(|(asked, _)| !Arc::ptr_eq(&asked.of, &awake)) {
            let gone = ApiError::conflict("the kernel that was to be saved has ended meanwhile");
            let _ = asked.reply.send(Err(gone));
        }
        let Some((asked, ready)) = self.asked.take_if(|(_, ready)| ready.is_done()) else { return };
        let reply = asked.reply.clone();
        // Since it was done this thread may have had something else to do.
        let ahead = ready.finish().and_then(|mut ahead| ahead.catch_up(&|| true).map(|_| ahead));
        let ahead = self.or_say(ahead);
        if let Err(error) = self.freeze(asked, ahead) {
            // It fails when the caller has gone.
            let _ = reply.send(Err(error));
        }
    }

    fn freeze(&mut self, asked: Asked, ahead: Option<CopiedAhead>) -> Result<(), ApiError> {
        let Asked { request, wish, reply, started, .. } = asked;
        let [progress, ended] = [self.progress(), self.progress()];
        let machine = self.kernels.machine();
        watch(machine, false)?;
        let stopped = Instant::now();
        let paused = machine.pause();
        if paused.has_ended() {
            return Err(ApiError::ending());
        }
        let frozen = paused.freeze(wish, ahead).map_err(|error| failed(&error))?;
        drop(paused);
        let pause = (!machine.is_paused()).then(|| stopped.elapsed());
        frozen.not_ahead().into_iter().for_each(|error| self.say_not_ahead(error));
        let path = request.path.clone();
        let done = move |saved: Result<Summary, SaveError>| {
            ended.end();
            let answer = saved.map_err(|error| ApiError::failed(complaint::one_line(&error)));
            let _ = reply
                .send(answer.map(|saved| Reply::Snapshot(summary(path, &saved, pause, started.elapsed()))));
        };
        let progress = move |done, total| progress.note(done, total);
        let begun = LiveSnapshot::begin(frozen, &request.path, progress, done);
        self.live = Some(begun.map_err(|error| failed(&error))?);
        Ok(())
    }
}
