//! Stories: what must be seen to work, told once and run with every guest, here and in the lab.
//!
//! In: a guest and a directory. Out: nothing, or why the story failed. Holds: a story starts `vmm` as a user would.

mod keeping;
mod ending;

pub use ending::{ends_with, types_and_is_answered};
pub use keeping::{capture_again, rounds, second_process};
