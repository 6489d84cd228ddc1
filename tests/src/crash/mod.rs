//! Snapshots that are cut short: processes that are killed, disks that lose what was not synced, system calls that fail.
//!
//! In: a running `vmm` and which of its system calls is to go wrong. Out: what it did to the files of a directory, and what a
//! disk could hold of that after a power cut. Holds: the calls are the real program's, seen from outside.

mod calls;
mod disk;
mod ptrace;
mod scene;
mod tracer;

pub use calls::{Change, Done};
pub use disk::{Dice, Disk, Luck};
pub use scene::{Attempt, Found, Scene, Way};
pub(crate) use scene::{generation, whole};
pub use tracer::{Fate, Plan, Tracer};
