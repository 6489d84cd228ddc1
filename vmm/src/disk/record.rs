//! What a snapshot says of its machine's disks, and whether it is still so.
//!
//! In: a machine's disks when it is saved; records from a snapshot when it is restored. Out: the records; open disks that
//! hold what they held then. Holds: disk and RAM belong together: a disk that was written since is refused by name, unless the
//! user says otherwise.

use super::keep::{self, KeepError, KeptDisk, Unclaimed};
use super::stamp::{Digest, Stamp, modified_ns};
use super::wish::{DiskPlace, check_id};
use super::{Disk, DiskError, DiskFile, EngineChoice};
use serde::{Deserialize, Serialize};
use snapshot::GenerationId;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A disk, as a snapshot knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// What its owner calls it.
    pub id: String,
    /// Where it was; none if it had no name, and so ended with its VM.
    pub path: Option<PathBuf>,
    /// Bytes.
    pub size: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// By what a later write is noticed; none of a disk that shows none.
    pub stamp: Option<Stamp>,
    /// Of all its bytes, if that was wished or came for nothing.
    pub digest: Option<Digest>,
    /// Its copy beside the snapshot.
    pub kept: Option<KeptDisk>,
}

/// What a snapshot does with disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCare {
    /// Keeps a copy of each beside the snapshot.
    pub keep: bool,
    /// Reads all of each for a digest.
    pub digest: bool,
    /// Refuses what takes long, since the guest is to stand still for an instant only.
    pub at_once: bool,
}

/// What is wrong with a disk of a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It, or its copy, can't be copied.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The host would not do it.
    #[error("cannot {step} it")]
    Io {
        /// What was to be done.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// What is on it may turn out not to be.
    #[error("it is on trial: the snapshot would lack what was written to it")]
    OnTrial,
    /// It would not be there when the snapshot is restored.
    #[error("it has no name and ends with this VM, so the snapshot would lack it: use --with-disks")]
    Nameless,
    /// It is not there.
    #[error("it had no name and ended with its VM: give its place with --disk ID=PATH")]
    Ended,
    /// Another size than the guest knows.
    #[error("{path} has {found} bytes, and had {expected} when the snapshot was taken")]
    Resized {
        /// Where it is.
        path: String,
        /// Bytes now.
        found: u64,
        /// Bytes then.
        expected: u64,
    },
    /// Written since.
    #[error("{0} was written since the snapshot was taken; --allow-changed-disks takes it as it is")]
    Changed(String),
    /// Perhaps written since.
    #[error(
        "{0} shows no sign by which a later write could be noticed; --allow-changed-disks takes it as it is"
    )]
    Unknown(String),
    /// A record that no snapshot of ours has.
    #[error("a record that makes no sense: {0}")]
    Nonsense(String),
}

/// A disk is in the way of a snapshot or of a restore.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// This one.
    #[error("disk `{id}`")]
    Disk {
        /// Which.
        id: String,
        /// Why.
        source: RecordError,
    },
    /// A place for a disk that the machine hasn't.
    #[error("--disk {id}=…: the machine has no disk of that id; it has {known}")]
    NoSuch {
        /// The id given.
        id: String,
        /// Those there are.
        known: String,
    },
}

/// Records the disks, which have been synced and stand still, for a snapshot that will be at `path`.
///
/// # Errors
/// The disk that failed; none is kept then.
pub(crate) fn record(
    disks: &[Disk],
    care: DiskCare,
    path: &Path,
    generation: &GenerationId,
) -> Result<(Vec<DiskRecord>, Unclaimed), DisksError> {
    let mut unclaimed = Unclaimed::default();
    let records = each(disks, |disk| record_one(disk, care, path, generation, &mut unclaimed))?;
    Ok((records, unclaimed))
}

fn record_one(
    Disk { id, file, .. }: &Disk,
    care: DiskCare,
    path: &Path,
    generation: &GenerationId,
    unclaimed: &mut Unclaimed,
) -> Result<DiskRecord, RecordError> {
    if file.trial.is_some() {
        return Err(RecordError::OnTrial);
    }
    if file.path.is_none() && !care.keep {
        return Err(RecordError::Nameless);
    }
    let keep = || keep::keep(file, id, (path, generation), care.at_once, unclaimed);
    let kept = care.keep.then(keep).transpose()?;
    let (kept, digest) = kept.map_or((None, None), |(kept, digest)| (Some(kept), digest));
    let digest = match digest {
        None if care.digest => Some(Digest::of(file).map_err(io("read"))?),
        digest => digest,
    };
    let stamp = Stamp::settled(file).map_err(io("look at"))?;
    let DiskFile { size, read_only, path, .. } = file.clone();
    Ok(DiskRecord { id: id.clone(), path, size, read_only, stamp, digest, kept })
}

/// Removes the disks that were kept with a snapshot which another has replaced, but for those that the other goes on with: a
/// read-only disk is used where it is kept.
pub(crate) fn remove_kept(replaced: &[DiskRecord], by: &[DiskRecord], snapshot: &Path) {
    let in_use = |path: &Path| by.iter().any(|record| record.path.as_deref() == Some(path));
    for kept in replaced.iter().filter_map(|record| record.kept.as_ref()) {
        let path = keep::directory(snapshot).join(&kept.file);
        if !in_use(&path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Checks records that may come from a hostile file.
///
/// # Errors
/// Names the disk whose record could lead anywhere but to a disk.
pub(crate) fn check(records: &[DiskRecord]) -> Result<(), DisksError> {
    each(records, |record| {
        let nonsense = |what: &str| RecordError::Nonsense(what.to_owned());
        check_id(&record.id).map_err(|error| nonsense(&error.to_string()))?;
        let is_name =
            |kept: &KeptDisk| Path::new(&kept.file).file_name().is_some_and(|name| *name == *kept.file);
        if record.kept.as_ref().is_some_and(|kept| !is_name(kept)) {
            return Err(nonsense("the kept disk's name is a path"));
        }
        Ok(())
    })
    .map(drop)
}

/// Opens the disks of a snapshot at `path`, each where it was, unless a place is given. One that was kept is copied: to the
/// place given, if nothing is there yet, and else to a file without a name.
///
/// # Errors
/// The disk that can't be had, or was written since and `allow_changed` was not said.
pub fn open(
    records: &[DiskRecord],
    path: &Path,
    places: &[DiskPlace],
    allow_changed: bool,
) -> Result<Vec<Disk>, DisksError> {
    for DiskPlace { id, .. } in places {
        if !records.iter().any(|record| record.id == *id) {
            let known: Vec<_> = records.iter().map(|record| format!("`{}`", record.id)).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(DisksError::NoSuch { id: id.clone(), known });
        }
    }
    each(records, |record| {
        let place = places.iter().find(|place| place.id == record.id);
        let file = record.open(path, place.map(|place| place.path.as_path()), allow_changed)?;
        let engine = place.map_or(EngineChoice::Auto, |place| place.engine);
        Ok(Disk { id: record.id.clone(), file, engine })
    })
}

impl DiskRecord {
    fn open(
        &self,
        snapshot: &Path,
        place: Option<&Path>,
        allow_changed: bool,
    ) -> Result<DiskFile, RecordError> {
        match (place, &self.kept) {
            (Some(place), Some(kept)) if !place.exists() => {
                Ok(keep::copy_to(&self.open_kept(kept, snapshot, allow_changed)?, place)?)
            }
            (None, Some(kept)) => {
                let kept = self.open_kept(kept, snapshot, allow_changed)?;
                if self.read_only {
                    return Ok(kept);
                }
                Ok(keep::private_copy(&kept, &keep::directory(snapshot))?)
            }
            (place, _) => {
                let path = place.or(self.path.as_deref()).ok_or(RecordError::Ended)?;
                let file = DiskFile::open(path, self.read_only)?;
                self.check(&file, allow_changed, |file| {
                    let unwritten_copy = match &self.kept {
                        Some(kept) => modified_ns(&file.file.metadata()?) == kept.modified_ns,
                        None => false,
                    };
                    Ok(unwritten_copy || Stamp::of(file)? == self.stamp)
                })?;
                Ok(file)
            }
        }
    }

    /// Whether this is the disk, and holds what it held then.
    ///
    /// # Errors
    /// It can't be looked at.
    pub(crate) fn is_of(&self, file: &DiskFile) -> io::Result<bool> {
        if file.size != self.size {
            return Ok(false);
        }
        if self.stamp.is_some() && Stamp::of(file)? == self.stamp {
            return Ok(true);
        }
        self.digest.map_or(Ok(false), |digest| Ok(Digest::of(file)? == digest))
    }

    /// A kept disk may have been carried elsewhere, so its time counts and its inode does not.
    fn open_kept(
        &self,
        kept: &KeptDisk,
        snapshot: &Path,
        allow_changed: bool,
    ) -> Result<DiskFile, RecordError> {
        let file = DiskFile::open(&keep::directory(snapshot).join(&kept.file), true)?;
        self.check(&file, allow_changed, |file| Ok(modified_ns(&file.file.metadata()?) == kept.modified_ns))?;
        Ok(file)
    }

    /// A digest is asked only where the stamp does not settle it.
    fn check(
        &self,
        file: &DiskFile,
        allow_changed: bool,
        same_stamp: impl FnOnce(&DiskFile) -> io::Result<bool>,
    ) -> Result<(), RecordError> {
        let path = file.path.as_deref().unwrap_or(Path::new("")).display().to_string();
        if file.size != self.size {
            return Err(RecordError::Resized { path, found: file.size, expected: self.size });
        }
        let known = self.stamp.is_some() || self.kept.is_some();
        if allow_changed || known && same_stamp(file).map_err(io("look at"))? {
            return Ok(());
        }
        match self.digest {
            Some(digest) if Digest::of(file).map_err(io("read"))? == digest => Ok(()),
            None if !known => Err(RecordError::Unknown(path)),
            _ => Err(RecordError::Changed(path)),
        }
    }
}

/// Does it to each, and says which failed.
pub(super) fn each<'a, T: Named + 'a, R>(
    disks: impl IntoIterator<Item = &'a T>,
    mut act: impl FnMut(&T) -> Result<R, RecordError>,
) -> Result<Vec<R>, DisksError> {
    disks
        .into_iter()
        .map(|disk| act(disk).map_err(|source| DisksError::Disk { id: disk.id().to_owned(), source }))
        .collect()
}

pub(super) trait Named {
    fn id(&self) -> &str;
}

impl Named for Disk {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Named for DiskRecord {
    fn id(&self) -> &str {
        &self.id
    }
}

pub(super) fn io(step: &'static str) -> impl Fn(io::Error) -> RecordError {
    move |source| RecordError::Io { step, source }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
