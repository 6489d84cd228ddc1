//! The machine: RAM, vCPUs and devices on KVM, and the ways to start, stop, keep and put it back.
//!
//! Files are in reading order: each imports only from those above it.

pub mod layout;
