//! The initramfs of the test guests.
//!
//! In: a stock kernel and, if wanted, the `witness` program. Out: an initramfs in the cache. Holds: its conventions are
//! those at the top of `init.sh`; beside busybox there are `vmm-exit` and `witness` on the guest's `PATH`.

use crate::initramfs::Initramfs;
use crate::stock::StockKernel;
use crate::vmm_exit::vmm_exit;
use anyhow::Result;
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("init.sh");
/// Tells the machine of a kernel panic.
const MODULES: [&str; 1] = ["pvpanic_mmio"];

/// The initramfs that makes `kernel` a test guest, with the static program `witness` in it if given.
///
/// # Errors
/// busybox can't be fetched, `witness` can't be read, or the cache can't be written.
pub fn test_initrd(kernel: &StockKernel, witness: Option<&Path>) -> Result<PathBuf> {
    let mut initramfs = Initramfs::new();
    initramfs.busybox()?.modules(kernel, &MODULES)?;
    initramfs.file("init", 0o755, INIT).file("bin/vmm-exit", 0o755, vmm_exit());
    if let Some(witness) = witness {
        initramfs.copy("bin/witness", witness)?;
    }
    initramfs.publish()
}
