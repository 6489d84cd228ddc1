//! QEMU as a monitor in the lab: what our devices are compared with.
//!
//! In: nothing. Out: a directory with Debian's QEMU, its libraries and firmware, and a script `qemu` that runs it from there.
//! Holds: it is the QEMU that the lab's own machine runs in.

use super::qemu;
use super::tools::copy;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const QEMU: &str = "usr/bin/qemu-system-x86_64";
const LOADER: &str = "ld-linux-x86-64.so.2";
/// What the machine `microvm` boots a kernel with.
const FIRMWARE: [&str; 5] = [
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/kvmvapic.bin",
];
const SCRIPT: &str = "#!/bin/sh\nhere=$(dirname \"$0\")\n\
     exec \"$here/ld-linux-x86-64.so.2\" --library-path \"$here/lib\" \"$here/qemu-system-x86_64\" -L \"$here\" \"$@\"\n";

/// Puts QEMU into `dir`.
///
/// # Errors
/// Debian's archive can't be reached, or `dir` not written.
pub fn install(dir: &Path) -> Result<()> {
    let packages = qemu::packages()?;
    fs::create_dir_all(dir.join("lib")).with_context(|| format!("cannot create {}", dir.display()))?;
    let program = packages.path(QEMU);
    copy(&program, &dir.join("qemu-system-x86_64"))?;
    copy(&packages.loader()?, &dir.join(LOADER))?;
    for (library, path) in packages.libraries(&program)? {
        copy(&path, &dir.join("lib").join(library))?;
    }
    for file in FIRMWARE.map(|file| packages.path(file)) {
        copy(&file, &dir.join(file.file_name().unwrap_or_default()))?;
    }
    let script = dir.join("qemu");
    fs::write(&script, SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
