//! Live snapshots, from when they are asked for until they are written behind the guest.
//!
//! In: a request. Out: a snapshot under way, of which its own thread tells the end. Holds: of the RAM of a restored guest most is copied while it runs and
//! the main thread listens to everybody else; what fails there only makes the guest stand still for longer.

use super::{Monitor, conflict, failed, summary, watch, wish};
use crate::api::{ApiError, Reply, SnapshotRequest};
use crate::complaint;
use crate::copy_ahead::{CopiedAhead, Plan};
use crate::disk;
use crate::live::{GettingReady, LiveSnapshot};
use crate::save::{SaveError, Wish};
use snapshot::Summary;
use std::sync::mpsc::Sender;
use std::time::Instant;

/// A live snapshot that somebody waits for.
pub(super) struct Asked {
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
        let asked = Asked { request, wish, reply, started: Instant::now() };
        match machine.copy_ahead().map_err(|error| failed(&error))? {
            Some(plan) => self.get_ready(asked, plan),
            None => {
                // What is written to the disks by now need not be waited for when the guest stands still.
                machine.sync_disks().map_err(|error| failed(&error))?;
                self.freeze(asked, None)
            }
        }
    }

    fn get_ready(&mut self, asked: Asked, plan: Plan) -> Result<(), ApiError> {
        let disks = self.kernels.awake().disks.clone();
        // What fails is told when they are synced once more, in the pause.
        let sync = move || drop(disk::sync(&disks));
        let ready = GettingReady::begin(plan, sync).map_err(|error| failed(&error))?;
        self.asked = Some((asked, ready));
        Ok(())
    }

    /// Has the guest stand still if all but the last of its RAM is copied.
    pub(super) fn hear_ready(&mut self) {
        let Some((asked, ready)) = self.asked.take_if(|(_, ready)| ready.is_done()) else { return };
        let reply = asked.reply.clone();
        let ahead = ready.finish().inspect_err(|error| {
            self.say(&format!("vmm: RAM is not copied ahead: {}", complaint::one_line(error)));
        });
        if let Err(error) = self.freeze(asked, ahead.ok()) {
            // It fails when the caller has gone.
            let _ = reply.send(Err(error));
        }
    }

    fn freeze(&mut self, asked: Asked, ahead: Option<CopiedAhead>) -> Result<(), ApiError> {
        let Asked { request, wish, reply, started } = asked;
        let [progress, ended] = [self.progress(), self.progress()];
        let machine = self.kernels.machine();
        if ahead.as_ref().is_some_and(|ahead| !ahead.is_of(machine.ram())) {
            return Err(ApiError::conflict("the kernel that was to be saved has ended meanwhile"));
        }
        watch(machine, false)?;
        let stopped = Instant::now();
        let paused = machine.pause();
        if paused.has_ended() {
            return Err(ApiError::ending());
        }
        let frozen = paused.freeze(wish, ahead).map_err(|error| failed(&error))?;
        drop(paused);
        let pause = (!machine.is_paused()).then(|| stopped.elapsed());
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
