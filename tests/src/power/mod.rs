//! Power cuts of a real file system on a block device, in the lab.
//!
//! In: what was written to the device and when it was flushed, as device mapper's log-writes noted it. Out: devices as a power cut
//! could have left them. Holds: what a flush came after is there, so is what was written through the cache; of what came since, any
//! part may be, 4 KiB at a time.

mod cut;
mod log;
mod mapper;
mod volume;

pub use cut::{Cut, cuts};
pub use log::{Entry, read};
pub use mapper::Logged;
pub use volume::{Device, make_file_system, mounted};
