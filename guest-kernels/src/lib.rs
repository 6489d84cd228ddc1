//! The guests: stock Debian kernels, and what they boot into.
//!
//! In: a kernel's short name (`6.1`, `6.12`, `7.2`). Out: its files in a cache outside git ([`ensure`]) and an initramfs
//! for it ([`Initramfs`], [`test_initrd`]). Holds: what is in the cache is whole and was checked against the SHA-256 in
//! [`manifest`] before it got there, and the same inputs give the same initramfs, byte for byte.

mod apt;
pub mod bare;
mod bzimage;
mod cache;
mod initramfs;
pub mod manifest;
mod modules;
mod packages;
mod root;
mod stock;
mod test_guest;
mod vmm_exit;

pub use apt::Archive;
pub use cache::{cache_dir, publish};
pub use initramfs::{CHARACTER_DEVICE, Initramfs};
pub use modules::{Module, load_order};
pub use packages::{Packages, run as run_to_end};
pub use root::root_image;
pub use stock::{StockKernel, all, busybox, cached, ensure};
pub use test_guest::test_initrd;
pub use vmm_exit::{EXIT_PORT, vmm_exit};
