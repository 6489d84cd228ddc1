//! A CD-ROM image from which a PC's firmware boots Linux.
//!
//! In: a kernel, an initramfs, a command line. Out: an ISO 9660 image with ISOLINUX in a file without a name. Holds:
//! nothing of it stays behind on the host's disk once the file is closed.

use super::Setup;
use anyhow::{Context, Result};
use guest_kernels::{Packages, run_to_end};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

/// The boot loader's own files in Debian's packages.
const LOADER: [&str; 2] = ["usr/lib/ISOLINUX/isolinux.bin", "usr/lib/syslinux/modules/bios/ldlinux.c32"];

pub(super) fn make(packages: &Packages, setup: &Setup, command_line: &str) -> Result<File> {
    let dir = tempfile::tempdir()?;
    let tree = dir.path().join("tree");
    fill(packages, setup, command_line, &tree)?;
    let image = dir.path().join("image");
    let mut xorriso = packages.command("usr/bin/xorriso")?;
    xorriso.args(["-no_rc", "-as", "mkisofs", "-quiet", "-o"]).arg(&image);
    xorriso.args(["-b", "isolinux.bin", "-c", "boot.cat"]);
    xorriso.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]).arg(&tree);
    run_to_end(&mut xorriso)?;
    Ok(File::open(&image)?)
}

fn fill(packages: &Packages, setup: &Setup, command_line: &str, tree: &Path) -> Result<()> {
    fs::create_dir(tree)?;
    for file in LOADER.map(|file| packages.path(file)) {
        let name = file.file_name().context("the loader's files have names")?;
        fs::copy(&file, tree.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    fs::copy(&setup.kernel.vmlinuz, tree.join("vmlinuz")).context("cannot copy the lab's kernel")?;
    let mut initramfs = setup.initramfs.try_clone()?;
    initramfs.seek(SeekFrom::Start(0))?;
    io::copy(&mut initramfs, &mut File::create(tree.join("initrd"))?).context("cannot copy the initramfs")?;
    fs::write(tree.join("isolinux.cfg"), menu(command_line))?;
    Ok(())
}

/// ISOLINUX's configuration: one kernel, at once.
fn menu(command_line: &str) -> String {
    format!("default lab\nprompt 0\nlabel lab\nlinux vmlinuz\ninitrd initrd\nappend {command_line}\n")
}
