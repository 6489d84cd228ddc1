//! Debian's programs that stories use, in the lab and in its guests.
//!
//! In: the names below. Out: a directory `bin`, `lib`, `lib64` with those programs, the shared libraries they need and
//! the dynamic loader. Holds: it works wherever `/tools` leads to it and `/lib64` and `/lib/x86_64-linux-gnu` lead to
//! its parts, which [`guest_kernels::Initramfs::debian_tools`] sees to.

use anyhow::{Context, Result};
use guest_kernels::Packages;
use std::fs;
use std::path::{Path, PathBuf};

/// Programs for networks, file systems, databases and dumps. busybox has no tap devices, no ext4, and no network namespaces by name.
pub(super) const NAMES: [&str; 11] = [
    "ip",
    "ss",
    "mke2fs",
    "e2fsck",
    "debugfs",
    "dumpe2fs",
    "resize2fs",
    "tcpdump",
    "sqlite3",
    "iperf3",
    "makedumpfile",
];
/// Names by which some are called too; they see them as options.
const LINKS: [(&str, &str); 2] = [("mkfs.ext4", "mke2fs"), ("fsck.ext4", "e2fsck")];
/// What libc opens by name when a thread is cancelled, so that no listing has it: iperf3 needs it.
pub(super) const LIBRARY: &str = "libgcc_s.so.1";
const PACKAGES: [&str; 6] = ["iproute2", "e2fsprogs", "tcpdump", "sqlite3", "iperf3", "makedumpfile"];
const SUITE: &str = "trixie";

/// Makes the directory and returns how many bytes it has.
pub(super) fn install(dir: &Path) -> Result<u64> {
    // Named after them, so that an older selection in the cache isn't taken for this one.
    let packages = Packages::ensure(&format!("lab-tools-{}", PACKAGES.join("-")), SUITE, &PACKAGES)?;
    for sub in ["bin", "lib", "lib64"] {
        fs::create_dir_all(dir.join(sub)).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let mut bytes = copy(&packages.loader()?, &dir.join("lib64/ld-linux-x86-64.so.2"))?;
    for name in NAMES {
        let program = find(&packages, name)?;
        bytes += copy(&program, &dir.join("bin").join(name))?;
        for (library, path) in packages.libraries(&program)? {
            bytes += copy(&path, &dir.join("lib").join(library))?;
        }
    }
    let library = packages.path("usr/lib/x86_64-linux-gnu").join(LIBRARY);
    bytes += copy(&library, &dir.join("lib").join(LIBRARY))?;
    for (link, name) in LINKS {
        std::os::unix::fs::symlink(name, dir.join("bin").join(link))?;
    }
    Ok(bytes)
}

fn find(packages: &Packages, name: &str) -> Result<PathBuf> {
    let places = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|place| packages.path(place).join(name));
    places.into_iter().find(|path| path.is_file()).with_context(|| format!("no package has {name}"))
}

/// Copies a file unless it is there, and returns how many bytes were copied.
pub(super) fn copy(from: &Path, to: &Path) -> Result<u64> {
    if to.exists() {
        return Ok(0);
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}
