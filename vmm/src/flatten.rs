//! Flatten: one full snapshot of a chain.
//!
//! In: a chain, a path. Out: a snapshot of the same machine that needs no other. Holds: no KVM is needed, and no byte of the machine's state is
//! another; it has an id of its own, since what is a difference to the chain's last is none to it.

use crate::disk;
use crate::load::{self, LoadError};
use crate::save::{self, SaveError};
use snapshot::{Chain, RamError, SealKey, Summary};
use std::path::{Path, PathBuf};

/// Why there is no such snapshot.
#[derive(Debug, thiserror::Error)]
pub enum FlattenError {
    /// The chain.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// RAM of the chain.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The new one.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The disks that are kept beside a snapshot are that one's.
    #[error("{} has disks kept beside it, which can't be another's too: only the same name will do", .0.display())]
    KeptDisks(PathBuf),
}

/// Writes the machine in the last of a chain to `path`, which may be that last one's own, and seals it with the key that the chain has been
/// authenticated with, if there is one.
///
/// # Errors
/// See [`FlattenError`]; what was there before still is.
pub fn flatten(
    chain: &Chain,
    path: &Path,
    key: Option<&SealKey>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, FlattenError> {
    let top = chain.top();
    let state = load::state(top)?;
    let has_kept = load::disks(top)?.iter().any(|record| record.kept.is_some());
    if has_kept && !disk::is_same_file(top.path(), path) {
        return Err(FlattenError::KeptDisks(top.path().to_owned()));
    }
    // Damage would be given good digests, and what somebody else has written a seal.
    chain.verify_ram(&mut |_, _| {})?;
    let ram = load::ram_of(chain)?;
    Ok(save::rewrite(top, &state, &ram, (path, key), progress)?)
}
