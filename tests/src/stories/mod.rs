//! Stories: what must be seen to work, told once and run with every guest, here and in the lab.
//!
//! In: a guest and a directory. Out: nothing, or why the story failed. Holds: a story starts `vmm` as a user would.

mod adopting;
mod agent;
mod ahead;
mod beside;
mod carrying;
mod clones;
mod disks;
mod dumping;
mod ending;
mod everything;
mod flock;
mod host_clock;
mod image_kernel;
mod incremental;
mod keeping;
mod kernel_id;
mod live;
mod moving;
mod network;
mod power_cuts;
mod refusing;
mod small_devices;
mod sockets;
mod stub;
mod switching;
mod time;
mod timing;
mod upgrading;
mod working_set;

pub use adopting::comes_out_of_a_file;
pub use agent::agent;
pub use ahead::{ahead_is_whole, ahead_leaves_no_trace, ahead_of_one_that_ends};
pub use beside::{boots_beside, ends_beside};
pub use carrying::{carried, renamed};
pub use clones::{GET_READY, clones};
pub use disks::{DO_WORK, keeps_its_disk, loses_no_commit, outlives_a_disk_that_hangs, worker};
pub use dumping::{dumped, dumped_by_panic, makedumpfile_reads_it, panic_is_in_the_dump};
pub use ending::{ends_with, is_within_reach, last_words, types_and_is_answered};
pub use everything::every_device;
pub use flock::flock;
pub use image_kernel::{After, End, outlives, return_cost, suspended_with, vmcore_rate, without_an_image};
pub use incremental::{chain, is_all, refused_parents, tracked_chain};
pub use keeping::{TELL_BOOT_ID, capture_again, follows, rounds, same_boot, second_process};
pub use kernel_id::knows_its_kernel;
pub use live::{Pauses, live, live_is_whole, live_leaves_no_trace};
pub use moving::{moved, not_moved};
pub use network::{BUSY, Gap, SERVE, by_descriptor, network_oracle, no_such_tap, on_the_network};
pub use power_cuts::power_cuts;
pub use refusing::{names, refused, refused_in, vmm_after, vmm_with};
pub use small_devices::{OBEY, small_devices};
pub use sockets::{ECHO_AND_CALL, ECHO_AND_HOLD, both_ways, socket_clones};
pub use stub::{by_stub, stub_rate};
pub use switching::{Pair, TELL_LIFE, Turn, nobody_is_lost, stale_disk, switch_cost, take_turns};
pub use time::{
    TELL_ONLY_TIME, TELL_TIME, TELL_TIME_BY_RTC, TELL_TIME_WITHOUT_AGENT, an_hour, asks_its_rtc,
    comes_back_later, has_an_agent, has_lost_its_agent, twins,
};
pub use timing::{tells_its_times, tells_of_one_that_sleeps};
pub use upgrading::{not_upgraded, upgrade_or_reboot, upgraded, upgraded_and_not};
pub use working_set::works_with_a_part;
