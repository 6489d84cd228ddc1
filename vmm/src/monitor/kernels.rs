//! What the monitor is asked about the VM's kernels.
//!
//! In: requests. Out: switches, and what is told of them. Holds: who can't be switched to leaves the machine to who runs.

use super::{Monitor, conflict, milliseconds, summary};
use crate::api::{
    Acceptance, ApiError, BootRequest, ImageRequest, KeptKernel, KernelList, KernelStatus, SleptTime,
    SnapshotSummary, SwitchRequest, SwitchSummary,
};
use crate::background_check;
use crate::boot::BootSource;
use crate::clock::TimePolicy;
use crate::complaint;
use crate::kernel::ProtocolChoice;
use crate::load;
use crate::outcome::Outcome;
use crate::switch::{ImageWish, Kept, KernelInfo, Newcomer, Next, SwitchError, Switched, Terms};
use std::path::{Path, PathBuf};
use std::time::Instant;

impl Monitor {
    pub(super) fn switch(&mut self, request: SwitchRequest) -> Result<SwitchSummary, ApiError> {
        self.expect_no_live()?;
        let time = match request.time {
            SleptTime::Advance => TimePolicy::Advance,
            SleptTime::Freeze => TimePolicy::Freeze,
        };
        let next = match (request.boot, request.snapshot, request.to) {
            (Some(boot), ..) => Next::Boot(newcomer(boot)),
            (_, Some(KeptKernel { path, name, share_disks }), _) => {
                Next::Snapshot(Kept { file: path, name, share_disks, time })
            }
            (.., Some(name)) => Next::Wake(name, time),
            _ => return Err(ApiError::bad_request("expected one of `to`, `boot` and `snapshot`")),
        };
        let terms = Terms { keep_in: request.keep_in, trial: request.trial };
        let switched = self.kernels.switch(&next, terms).map_err(|error| {
            if matches!(error, SwitchError::Both { .. }) {
                self.end(Outcome::Fault(complaint::one_line(&error)));
            }
            conflict(&error)
        })?;
        self.say(&complaint::printable(&switched.to_string()));
        if let Next::Snapshot(kept) = &next {
            self.check_meanwhile(&kept.file);
        }
        let (pause_ms, saved_ms) = (milliseconds(switched.pause), milliseconds(switched.saved));
        let Switched { from, ended: from_ended, to, .. } = switched;
        Ok(SwitchSummary { from, from_ended, to, pause_ms, saved_ms })
    }

    pub(super) fn kernel_list(&self) -> KernelList {
        KernelList { kernels: self.kernels.list().into_iter().map(status).collect() }
    }

    /// A kernel that boots beside the one that is awake.
    pub(super) fn prepare(&mut self, boot: BootRequest) -> Result<KernelStatus, ApiError> {
        self.kernels.boot_beside(&newcomer(boot)).map(status).map_err(|error| conflict(&error))
    }

    pub(super) fn accept(&mut self) -> Result<Acceptance, ApiError> {
        let started = Instant::now();
        let written_bytes = self.kernels.accept().map_err(|error| conflict(&error))?;
        Ok(Acceptance { written_bytes, total_ms: milliseconds(started.elapsed()) })
    }

    /// One that ends beside is told of, and asks nothing of anybody.
    pub(super) fn hear_beside(&mut self) {
        let Some((stop, panicked)) = self.kernels.beside_stopped() else { return };
        let outcome = Outcome::of(stop, panicked);
        if let Some((name, why)) = self.kernels.end_beside(&outcome.to_string()) {
            self.say(&complaint::printable(&format!("vmm: kernel `{name}`, beside, has ended: {why}")));
        }
    }

    /// The kernel that runs beside goes on.
    pub(super) fn snapshot_beside(&mut self, name: &str, path: PathBuf) -> Result<SnapshotSummary, ApiError> {
        let started = Instant::now();
        let saved = self.kernels.save_beside(name, &path).map_err(|error| conflict(&error))?;
        let total = started.elapsed();
        Ok(summary(path, &saved, Some(total), total))
    }

    /// RAM of a file is held against its digests while the guest runs, as by `vmm restore`.
    fn check_meanwhile(&mut self, file: &Path) {
        let alarm = self.kernels.machine().alarm();
        let started = load::open_chain(file).map_err(|error| complaint::one_line(&error)).and_then(|chain| {
            background_check::start(chain, move |why| alarm.ring(why)).map_err(|error| error.to_string())
        });
        if let Err(why) = started {
            self.say(&complaint::printable(&format!("vmm: the guest's RAM is not checked: {why}")));
        }
    }
}

fn status(info: KernelInfo) -> KernelStatus {
    KernelStatus {
        name: info.name,
        version: info.shape.kernel.version,
        asleep: info.asleep.is_some(),
        memory_bytes: info.shape.memory,
        resident_bytes: info.resident,
        asleep_seconds: info.asleep.unwrap_or_default().as_secs_f64(),
        kept_in: info.file,
        beside: info.beside,
        vsock: info.vsock,
        ended: info.ended,
        on_trial: info.on_trial,
    }
}

fn newcomer(boot: BootRequest) -> Newcomer {
    let BootRequest { kernel, initrd, cmdline, memory_bytes, vcpus, name, share_disks, image } = boot;
    let source = BootSource { kernel, initrd, cmdline, protocol: ProtocolChoice::Auto, reserved: Vec::new() };
    let image = image.map(|ImageRequest { write_to }| ImageWish { write_to });
    Newcomer { name, source, memory: memory_bytes, vcpus, share_disks, image }
}
