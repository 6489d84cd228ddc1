//! Bad input, end to end: what `vmm` refuses, it refuses soon, with one line that names the thing and the right status,
//! and leaves nothing behind. Damaged and forged snapshots are in `bad_snapshots.rs`.
//!
//! These tests need root and a `/dev/kvm`, and fail without.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use tempfile::{TempDir, tempdir};
use vmm_tests::guests::Guest;
use vmm_tests::stories::{names, refused, refused_in, vmm_after, vmm_with};
use vmm_tests::vm::{TestVm, program, text, vmm};

/// A directory with a bootable guest in it, and the arguments that boot it.
fn bootable() -> Result<(TempDir, Vec<String>)> {
    let dir = tempdir()?;
    let args = Guest::bare("counter", dir.path())?.memory("4M").run_args();
    Ok((dir, args))
}

fn with<'a>(args: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    args.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

fn make_fifo(path: &Path) -> Result<()> {
    let made = Command::new("mkfifo").arg(path).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    Ok(())
}

#[test]
fn kernels_and_initrds_that_are_none() -> Result<()> {
    let (dir, args) = bootable()?;
    let file = |name: &str| dir.path().join(name);
    fs::write(file("text"), "not a kernel\n")?;
    fs::write(file("empty"), "")?;
    fs::write(
        file("random"),
        (0..9000u32).flat_map(|n| (n.wrapping_mul(n)).to_le_bytes()).collect::<Vec<_>>(),
    )?;
    fs::copy(vmm_tests::vm::program(), file("program"))?;
    fs::create_dir(file("directory"))?;
    make_fifo(&file("fifo"))?;
    let kernels = [
        ("missing", "No such file"),
        ("text", "a text file"),
        ("empty", "empty"),
        ("random", "data"),
        ("program", "ELF"),
        ("directory", "a directory"),
        ("fifo", "a FIFO"),
    ];
    for (name, what) in kernels {
        let path = file(name);
        let path = text(&path)?;
        refused_in(dir.path(), vmm_with(["run", "--kernel", path]), 1, &[path, what])?;
    }
    for (name, what) in
        [("missing", "No such file"), ("empty", "empty"), ("directory", "a directory"), ("fifo", "a FIFO")]
    {
        let path = file(name);
        let path = text(&path)?;
        refused_in(dir.path(), vmm_with(with(&args, &["--initrd", path])), 1, &[path, what])?;
    }
    Ok(())
}

#[test]
fn what_does_not_fit_in_memory() -> Result<()> {
    let (dir, args) = bootable()?;
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, vec![1; 8 << 20])?;
    let initrd = text(&initrd)?;
    refused_in(dir.path(), vmm_with(with(&args, &["--initrd", initrd])), 1, &[initrd, "8 MiB"])?;
    let cmdline = "x".repeat(100_000);
    let long = ["run", "--kernel", &args[2], "--cmdline", &cmdline];
    refused_in(dir.path(), vmm_with(long), 1, &["command line"])?;
    Ok(())
}

#[test]
fn memory_and_cpus_that_cannot_be_had() -> Result<()> {
    let (dir, args) = bootable()?;
    let run = |option: &str, value: &str, status, words: &[&str]| {
        let args = ["run", "--kernel", &args[2], option, value];
        refused_in(dir.path(), vmm_with(args), status, words)
    };
    for value in ["0", "1M", "-5", "lots", "1.5G", "", "99999999999999999999T"] {
        run("--memory", value, 2, &["--memory", value])?;
    }
    run("--memory", "1000T", 1, &["1048576000 MiB", "RAM"])?;
    for value in ["0", "17", "500", "two", "-1", ""] {
        run("--cpus", value, 2, &["--cpus", value, "1 to 16"])?;
    }
    Ok(())
}

#[test]
fn wrong_usage() -> Result<()> {
    refused(vmm_with(["run"]), 2, &["--kernel"])?;
    refused(vmm_with(["fly"]), 2, &["fly"])?;
    refused(vmm_with(["run", "--kernal", "x"]), 2, &["--kernal"])?;
    refused(vmm_with(["run", "--kernel", "x", "--entry", "side"]), 2, &["--entry", "side", "pvh"])?;
    refused(vmm_with(["run", "--kernel", "x", "--name", "two\nlines"]), 2, &["--name"])?;
    refused(vmm_with(["restore", "--paused", "x"]), 2, &["--api"])?;
    refused(vmm_with(["snapshot", "x"]), 2, &["--api"])?;
    refused(vmm_with(["dump", "x"]), 2, &["--api"])?;
    refused(vmm_with(["restore", "x", "--on-panic", "x"]), 2, &["--on-panic", "expected dump=FILE"])?;
    refused(vmm_with(["restore", "x", "-n", "2"]), 2, &["--api-dir"])?;
    refused(vmm_with(["restore", "x", "--api-dir", "d"]), 2, &["--clones"])?;
    refused(vmm_with(["restore", "x", "-n", "0", "--api-dir", "d"]), 2, &["0", "1..=4096"])?;
    refused(vmm_with(["restore", "x", "-n", "2", "--api-dir", "d", "--api", "a"]), 2, &["--api"])?;
    refused(vmm_with(["restore", "no\nsuch\x1b[2J"]), 1, &["no\\nsuch"])?;
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let output = vmm(args.iter().copied())?;
        ensure!(output.status.success() && output.stderr.is_empty() && !output.stdout.is_empty(), "{args:?}");
    }
    Ok(())
}

/// `/dev` with nothing in it, with a file that is no KVM, and with a KVM that may not be opened.
#[test]
fn hosts_without_kvm() -> Result<()> {
    let (dir, args) = bootable()?;
    let empty = "mount -t tmpfs none /dev";
    let closed = "mount -t tmpfs none /dev; mknod -m 000 /dev/kvm c 10 232
        set -- setpriv --bounding-set -dac_override,-dac_read_search \"$@\"";
    let hosts = [
        (empty, "not there"),
        ("mount -t tmpfs none /dev; : > /dev/kvm", "not a KVM"),
        ("mount --bind /dev/null /dev/kvm", "not a KVM"),
        (closed, "permission"),
    ];
    for (setup, why) in hosts {
        let command = vmm_after(setup, with(&args, &[]));
        refused_in(dir.path(), command, 1, &["/dev/kvm", why]).context(setup)?;
        refused(vmm_after(setup, ["restore", "x"]), 1, &["/dev/kvm", why]).context(setup)?;
        let doctor = vmm_after(setup, ["doctor", "--json"]).output()?;
        let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).context(setup)?;
        ensure!(report["linux"]["possible"] == false, "{report}");
        ensure!(report["problem"].as_str().is_some_and(|problem| problem.contains(why)), "{report}");
    }
    Ok(())
}

#[test]
fn sockets_that_cannot_be_had() -> Result<()> {
    let (dir, args) = bootable()?;
    let file = |name: &str| dir.path().join(name);
    let _listener = UnixListener::bind(file("used"))?;
    fs::write(file("precious"), "precious")?;
    let long = "s".repeat(120);
    let sockets =
        [("used", "in use"), ("precious", "not a socket"), (&*long, "107"), ("none/api", "No such file")];
    for (name, why) in sockets {
        let path = file(name);
        let path = text(&path)?;
        refused_in(dir.path(), vmm_with(with(&args, &["--api", path])), 1, &[path, why])?;
    }
    // A socket that was made goes with the machine that didn't come to be.
    let (free, none) = (file("free"), file("none"));
    let run = ["run", "--api", text(&free)?, "--kernel", text(&none)?];
    refused_in(dir.path(), vmm_with(run), 1, &[text(&none)?])?;
    ensure!(fs::read_to_string(file("precious"))? == "precious");
    Ok(())
}

#[test]
fn machines_that_do_not_answer() -> Result<()> {
    let dir = tempdir()?;
    let (missing, dead) = (dir.path().join("missing"), dir.path().join("dead"));
    drop(UnixListener::bind(&dead)?);
    for (path, why) in [(missing, "no API socket"), (dead, "nobody answers")] {
        let path = text(&path)?;
        for verb in ["status", "pause", "resume", "stop"] {
            refused_in(dir.path(), vmm_with([verb, "--api", path]), 1, &[path, why])?;
        }
        refused_in(dir.path(), vmm_with(["snapshot", "--api", path, "file"]), 1, &[path, why])?;
    }
    Ok(())
}

#[test]
fn snapshots_that_have_no_place() -> Result<()> {
    let (dir, args) = bootable()?;
    let mut vm = TestVm::start(&args)?;
    vm.wait_for("tick ")?;
    let file = |name: &str| dir.path().join(name);
    fs::create_dir(file("directory"))?;
    make_fifo(&file("fifo"))?;
    let places =
        [("directory", "a directory"), ("fifo", "a pipe"), ("none/file", "No such file"), ("..", "not name")];
    for (name, why) in places {
        let path = file(name);
        let path = text(&path)?;
        for verb in ["snapshot", "dump"] {
            let command = vmm_with([verb, "--api", text(vm.socket())?, path]);
            refused_in(dir.path(), command, 1, &[path, why])?;
        }
        let wish = format!("dump={path}");
        let command = vmm_with(with(&args, &["--on-panic", &wish]));
        refused_in(dir.path(), command, 1, &[path, why])?;
    }
    goes_on(&mut vm, "tick ")
}

/// Neither a full nor a read-only disk hurts the snapshot that was there, nor the machine.
#[test]
fn disks_that_take_nothing() -> Result<()> {
    let dir = tempdir()?;
    let guest = Guest::bare("dirty", dir.path())?.cmdline("size=16 lines=20").pulse("written=");
    let disk = dir.path().join("disk");
    fs::create_dir(&disk)?;
    let mount = format!("mount -t tmpfs -o size=24m none {}", disk.display());
    let args = guest.run_args();
    let mut vm = TestVm::start_as(vmm_after(&mount, with(&args, &[])))?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot(&disk.join("kept"), "resume")?;
    // The disk as the VM sees it.
    let seen = Path::new("/proc").join(vm.pid().to_string()).join("root").join(disk.strip_prefix("/")?);
    let kept = fs::read(seen.join("kept"))?;

    let save = |vm: &TestVm, verb: &str, name: &str| {
        Ok::<_, anyhow::Error>(vmm_with([verb, "--api", text(vm.socket())?, text(&disk.join(name))?]))
    };
    let ways = [("snapshot", "kept"), ("snapshot", "new"), ("dump", "kept"), ("dump", "new")];
    for (verb, name) in ways {
        refused_in(&seen, save(&vm, verb, name)?, 1, &[name, "No space left on device"])?;
    }
    let remount = format!("mount -o remount,ro {}", disk.display());
    let pid = vm.pid().to_string();
    let remounted =
        Command::new("nsenter").args(["--target", &pid, "--mount", "sh", "-c", &remount]).status()?;
    ensure!(remounted.success(), "remount: {remounted}");
    for (verb, name) in ways {
        refused_in(&seen, save(&vm, verb, name)?, 1, &[name, "Read-only file system"])?;
    }
    ensure!(names(&seen)?.len() == 1 && fs::read(seen.join("kept"))? == kept, "the snapshot has changed");
    ensure!(vmm(["verify", text(&seen.join("kept"))?])?.status.success(), "the snapshot is damaged");
    goes_on(&mut vm, guest.pulse)
}

/// A limit on file sizes used to end the process, and the machine with it, by SIGXFSZ.
#[test]
fn memory_and_files_that_may_not_be_so_long() -> Result<()> {
    let (dir, args) = bootable()?;
    let limited = |limit: &str, args: &[String]| {
        let mut command = Command::new("prlimit");
        command.arg(limit).arg(program()).args(args);
        command
    };
    let large = Guest::bare("counter", dir.path())?.memory("512M").run_args();
    let little = limited("--as=400000000", &large);
    refused_in(dir.path(), little, 1, &["bytes of guest RAM", "Cannot allocate memory"])?;
    let mut vm = TestVm::start_as(limited("--fsize=4194304", &args))?;
    vm.wait_for("tick ")?;
    let file = dir.path().join("file");
    let command = vmm_with(["snapshot", "--api", text(vm.socket())?, text(&file)?]);
    refused_in(dir.path(), command, 1, &[text(&file)?, "File too large"])?;
    goes_on(&mut vm, "tick ")
}

fn goes_on(vm: &mut TestVm, pulse: &str) -> Result<()> {
    ensure!(vm.ask("status", &[])?["state"] == "running", "the machine does not run");
    (0..3).try_for_each(|_| vm.wait_for(pulse).map(drop))
}

/// `vmm doctor` decides which of the two this test expects.
#[test]
fn linux_where_it_cannot_run() -> Result<()> {
    let report = vmm(["doctor", "--json"])?;
    ensure!(report.status.success(), "{}", String::from_utf8_lossy(&report.stderr));
    let report: serde_json::Value = serde_json::from_slice(&report.stdout)?;
    let possible = report["linux"]["possible"].as_bool().context("doctor gives no verdict")?;
    let kernel = guest_kernels::ensure("6.1")?;
    for image in [&kernel.vmlinuz, &kernel.vmlinux] {
        let args = ["run", "--cmdline", "console=ttyS0 panic=-1", "--kernel", text(image)?];
        refused(
            vmm_with([&args[..], &["--memory", "16M"]].concat()),
            1,
            &[text(image)?, "needs RAM", "16 MiB"],
        )?;
        if possible {
            TestVm::start(&args.map(str::to_owned))?.wait_for("Linux version 6.1")?;
        } else {
            let started = Instant::now();
            refused(vmm_with(args), 1, &["cannot run Linux", "make lab", "--force"])?;
            eprintln!("{}: refused in {:?}", image.display(), started.elapsed());
        }
    }
    Ok(())
}
