//! The machine: RAM, vCPUs and devices on KVM, and the ways to start, stop, keep and put it back.
//!
//! Files are in reading order: each imports only from those above it.

pub mod acpi;
pub mod board;
pub mod boot;
pub mod capture;
pub mod config;
pub mod cpuid;
pub mod kernel;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod msr;
pub mod panic_watch;
pub mod ram;
pub mod restore;
pub mod run_loop;
pub mod vcpu;
pub mod vcpu_state;
pub mod vcpu_thread;
pub mod vm;
pub mod vm_state;
