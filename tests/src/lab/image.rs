//! What is in the lab.
//!
//! In: a host kernel, our programs, a command, a directory of the caller's. Out: an initramfs in a file without a name, and a
//! disk with the guest kernels and Debian's tools that is made once. Holds: the command arrives byte for byte.

use super::programs::Programs;
use super::{qemu, terminal, tools};
use anyhow::{Context, Result, ensure};
use guest_kernels::{Initramfs, StockKernel, run_to_end};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// The first program of the lab.
const INIT: &str = include_str!("init.sh");
/// Debian's busybox takes a name for its own applet wherever it can; its `ip` has no tap devices and its `mke2fs` no ext4.
const PROFILE: &str = "ip() { /tools/bin/ip \"$@\"; }\nmke2fs() { /tools/bin/mke2fs \"$@\"; }\n";
/// Modules of every lab: what guests' networks, sockets and disks need on the host side, and what notes writes to a device. The kernel loads them on demand.
const MODULES: [&str; 8] =
    ["tun", "veth", "bridge", "vhost_vsock", "vsock_loopback", "loop", "tcp_diag", "dm_log_writes"];

/// How a lane's machine is wired.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wiring {
    /// The device that carries the command's output and, in an interactive session, is its terminal.
    pub(super) channel: &'static str,
    /// The block device with the guest kernels and the tools.
    pub(super) kernels: &'static str,
    /// Modules that these two need.
    pub(super) modules: &'static [&'static str],
}

/// What goes into an initramfs.
pub(super) struct Contents<'a> {
    pub(super) kernel: &'a StockKernel,
    pub(super) wiring: Wiring,
    /// The KVM module and its parameters.
    pub(super) kvm: (&'a str, &'a str),
    pub(super) token: &'a str,
    /// `None` for an interactive shell.
    pub(super) command: Option<&'a str>,
    pub(super) programs: &'a Programs,
    pub(super) extra: Option<&'a Path>,
}

impl Contents<'_> {
    /// Writes the initramfs.
    pub(super) fn initramfs(&self) -> Result<File> {
        let mut initramfs = Initramfs::new();
        initramfs.busybox()?.file("init", 0o755, INIT).copy("bin/vmm", &self.programs.vmm)?;
        initramfs.modules(self.kernel, &self.modules())?;
        initramfs.file("lab/settings", 0o644, self.settings()?).file("lab/profile", 0o644, PROFILE);
        if let Some(command) = self.command {
            initramfs.file("lab/run", 0o644, command);
        }
        self.add_guests(&mut initramfs)?;
        initramfs.dir("extra");
        if let Some(extra) = self.extra {
            initramfs.tree("extra", extra)?;
        }
        write(&initramfs).context("cannot write the lab's initramfs")
    }

    fn modules(&self) -> Vec<&str> {
        let mut names = self.wiring.modules.to_vec();
        names.push(self.kvm.0);
        names.extend(MODULES);
        names
    }

    /// The lines that init.sh reads, in its order.
    fn settings(&self) -> Result<String> {
        let (module, args) = self.kvm;
        ensure!(!args.contains('\n'), "parameters of {module} are one line");
        let (rows, columns) = terminal::size().unwrap_or((24, 80));
        let modules = self.wiring.modules.join(" ");
        let Wiring { channel, kernels, .. } = self.wiring;
        let token = self.token;
        Ok(format!("{channel}\n{kernels}\n{modules}\n{module} {args}\n{token}\n{rows} {columns}\n"))
    }

    /// The guests' initrds, and links to their kernels on the disk. The initrds change more often than the kernels.
    fn add_guests(&self, initramfs: &mut Initramfs) -> Result<()> {
        for kernel in guest_kernels::all()? {
            let dir = format!("guests/{}", kernel.name);
            let programs: Vec<&Path> = self.programs.for_guests.iter().map(PathBuf::as_path).collect();
            let initrd = guest_kernels::test_initrd(&kernel, &programs)?;
            initramfs.copy(&format!("{dir}/initrd"), &initrd)?;
            for file in ["vmlinuz", "vmlinux"] {
                initramfs.symlink(&format!("{dir}/{file}"), &format!("/lab/kernels/{}/{file}", kernel.name));
            }
        }
        initramfs.dir("lab/kernels").debian_tools().symlink("tools", "lab/kernels/tools");
        initramfs.symlink("guests/root", "/lab/kernels/root");
        Ok(())
    }
}

fn write(initramfs: &Initramfs) -> Result<File> {
    let mut out = BufWriter::with_capacity(1 << 20, tempfile::tempfile()?);
    initramfs.write_to(&mut out)?;
    out.flush()?;
    Ok(out.into_inner()?)
}

/// An ext4 image in the cache with `<name>/vmlinuz` and `<name>/vmlinux` of each guest kernel, the guests' root as `root`, and
/// the tools in `tools/`.
pub(super) fn disk() -> Result<PathBuf> {
    let kernels = guest_kernels::all()?;
    let root = guest_kernels::root_image()?;
    let releases = kernels.iter().map(|kernel| kernel.release.as_str());
    let recipe = root.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    let contents: Vec<&str> = releases.chain(tools::NAMES).chain([tools::LIBRARY, recipe]).collect();
    let dir = guest_kernels::cache_dir()?.join(format!("lab-disk-{}", contents.join("-")));
    guest_kernels::publish(&dir, |dir| {
        make_disk(&kernels, &root, dir).context("cannot make the lab's disk")
    })?;
    Ok(dir.join("disk"))
}

fn make_disk(kernels: &[StockKernel], root: &Path, dir: &Path) -> Result<()> {
    let tree = dir.join("tree");
    let mut bytes = tools::install(&tree.join("tools"))?;
    for kernel in kernels {
        let inside = tree.join(&kernel.name);
        fs::create_dir_all(&inside)?;
        bytes += fs::copy(&kernel.vmlinuz, inside.join("vmlinuz"))?;
        bytes += fs::copy(&kernel.vmlinux, inside.join("vmlinux"))?;
    }
    bytes += fs::copy(root, tree.join("root"))?;
    let mut mke2fs = qemu::packages()?.command("usr/sbin/mke2fs")?;
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(&tree).arg(dir.join("disk"));
    // A tenth and 8 MiB more than the files for what ext4 itself takes.
    run_to_end(mke2fs.arg(format!("{}K", bytes / 1024 * 11 / 10 + 8192)))?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}
