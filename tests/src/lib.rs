//! The harness.
//!
//! In: a story a test wants to tell. Out: a machine it can tell it on. Holds: a test that cannot run fails and says why.

pub mod autopsy;
pub mod bench;
pub mod bridge;
pub mod crash;
pub mod demo;
pub mod device_bench;
pub mod effort;
pub mod forge;
pub mod figures;
pub mod floor;
pub mod guests;
pub mod lab;
pub mod lost;
pub mod oracle;
pub mod power;
pub mod stories;
pub mod stub_rate;
pub mod vm;
