//! The machine: RAM, vCPUs and devices on KVM, and the ways to start, stop, keep and put it back.
//!
//! The modules stand in reading order: each imports only from those above it.

// What a guest finds.
pub mod layout;
pub mod kernel;
pub mod boot;
pub mod acpi;
pub mod config;
pub mod options;
// KVM, one piece each.
pub mod lost_ram;
pub mod ram;
pub mod frozen;
pub mod disk;
pub mod vmcoreinfo;
pub mod kvm;
pub mod cpuid;
pub mod msr;
pub mod clock;
pub mod vcpu_state;
pub mod voucher;
pub mod vm_state;
pub mod vm;
pub mod dirty_log;
pub mod copy_ahead;
pub mod vcpu;
// Running.
pub mod fault;
pub mod run_loop;
pub mod timing;
mod kick_timer;
mod soon;
pub mod vcpu_thread;
mod checkpointer;
mod tail;
pub mod console_out;
pub mod panic_watch;
pub mod io_thread;
pub mod discard;
pub mod console_thread;
pub mod tap;
pub mod no_wire;
pub mod socket_file;
pub mod vsock;
pub mod virtio;
pub mod network;
pub mod overrides;
pub mod board;
pub mod machine;
// Keeping.
pub mod capture;
pub mod restore;
pub mod save;
pub mod live;
pub mod stub;
pub mod kernel_id;
pub mod load;
pub mod flatten;
pub mod start;
pub mod working_set;
pub mod switch;
// The user's side.
pub mod complaint;
pub mod panic_dump;
pub mod clones;
pub mod outcome;
pub mod signals;
pub mod terminal;
pub mod http;
pub mod progress;
pub mod api;
pub mod api_server;
pub mod client;
pub mod inspect;
pub mod saving_bar;
pub mod background_check;
pub mod archive;
mod probe;
mod probes;
pub mod doctor;
pub mod monitor;
pub mod cli;
pub mod exec;
pub mod process_file;
pub mod processes;
pub mod ask_agent;
pub mod upgrade;
pub mod wall_clock;
