//! The guest agent: what the host asks of a guest's user space, over vsock.
//!
//! In: a connection, and one request on it. Out: what came of it. Holds: each side takes the other for hostile: every frame
//! has a bounded length, every field is checked, and nobody waits for the other longer than it chose to.
//!
//! ```text
//! client (host)                                server (vmm-agent, in the guest, port 1024)
//!   │  ◄──────────── Hello version ───────────────┤
//!   ├─ Exec arguments ─►                          │ runs the command
//!   ├─ Stdin bytes ─► … Stdin nothing ─►          │ an empty one is the end of input
//!   │  ◄── Stdout bytes, Stderr bytes … Exited or Signalled
//!   ├─ SetClock · Reseed ─►       ◄── Done        │
//!   ├─ ListTcp · KillTcp ─►       ◄── Socket … Done
//!   │                     or      ◄── Failed errno, text
//!
//! a frame:   0  length of the payload, u32      at most 65536
//!            4  kind, u32                       see `message`
//!            8  payload                         all numbers little-endian
//! ```
//!
//! A connection carries one request. When the client closes it, a command that still runs is killed.

pub mod wire;
pub mod message;
pub mod client;
pub mod exec;
pub mod system;
pub mod tcp;
pub mod server;
pub mod vsock;

pub use client::{Client, ClientError, Ended, Streams};

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;
/// The version of the protocol; another one is another language.
pub const VERSION: u32 = 1;
