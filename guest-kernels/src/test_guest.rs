//! The initramfs of the test guests.
//!
//! In: a stock kernel and static programs. Out: an initramfs in the cache. Holds: its conventions are those at the top of
//! `init.sh`; beside busybox there are `vmm-exit` and the given programs on the guest's `PATH`.

use crate::initramfs::Initramfs;
use crate::stock::StockKernel;
use crate::vmm_exit::vmm_exit;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("init.sh");
/// The drivers of what a machine may have; init.sh loads those of what it has.
const DRIVERS: [&str; 8] = [
    "pvpanic_mmio",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
];
/// Loaded when `modules=` asks for it, or by the kernel itself when a program asks for TCP sockets' state.
const ON_DEMAND: [&str; 2] = ["ptp_kvm", "tcp_diag"];
/// What CRIU needs of a kernel to see and hold connections, loaded when there is a `root=`.
const FOR_CHECKPOINTS: [&str; 8] = [
    "nf_tables",
    "nft_ct",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "netlink_diag",
    "af_packet_diag",
];

/// The initramfs that makes `kernel` a test guest, with these static programs in `/bin`.
///
/// # Errors
/// busybox can't be fetched, a program can't be read, or the cache can't be written.
pub fn test_initrd(kernel: &StockKernel, programs: &[&Path]) -> Result<PathBuf> {
    let mut initramfs = Initramfs::new();
    initramfs.busybox()?.modules(kernel, &[&DRIVERS[..], &ON_DEMAND, &FOR_CHECKPOINTS].concat())?;
    initramfs.dir("mnt").debian_tools().symlink("tools", "mnt/tools");
    initramfs.file("init", 0o755, INIT).file("bin/vmm-exit", 0o755, vmm_exit());
    for program in programs {
        let name = program.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} has no name for the guest", program.display()))?;
        initramfs.copy(&format!("bin/{name}"), program)?;
    }
    initramfs.publish()
}
