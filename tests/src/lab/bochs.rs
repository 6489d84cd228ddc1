//! The Intel lane: Bochs, whose processor has VMX with EPT, and `kvm_intel`.
//!
//! In: a kernel, an initramfs, a disk. Out: a running machine whose channel is its second serial port. Holds: Bochs is
//! Debian's 2.7 with its own libraries, whatever this machine has; it has its files open by the time it runs and needs
//! none of their names; it ends when its kernel panics or reboots.

use super::Setup;
use super::image::Wiring;
use super::iso;
use super::pty::Pty;
use super::screen;
use super::session::{Emulator, Machine};
use anyhow::{Context, Result};
use guest_kernels::Packages;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{ChildStderr, Command, Stdio};
use std::thread::JoinHandle;

/// Debian 12 has Bochs 2.7, the version that this lane was made with.
const SUITE: &str = "bookworm";
/// `bochs` takes either set of ROMs; `ncurses-base` knows the terminal that the display believes it has.
const PACKAGES: [&str; 8] =
    ["bochs", "bochs-term", "bochsbios", "vgabios", "ncurses-base", "isolinux", "syslinux-common", "xorriso"];
/// Instructions in a second of the machine's own time, which stands still while Bochs does; idle time is skipped.
const INSTRUCTIONS_PER_SECOND: u32 = 100_000_000;
/// `reboot=t` with `reset_on_triple_fault=0` has a panic end Bochs instead of starting the command again. Bochs
/// announces XSAVES and XSAVEC and then fails at them. The rest is as on the AMD lane, and to save time.
const COMMAND_LINE: &str = "console=ttyS0,115200 quiet panic=-1 reboot=t mitigations=off nokaslr tsc=reliable \
                            cryptomgr.notests clearcpuid=xsaves,xsavec";

/// A serial port is a terminal and, in raw mode, binary-clean.
pub(super) fn wiring() -> Wiring {
    Wiring { channel: "/dev/ttyS1", kernels: "/dev/sda", modules: &["ata_piix", "sd_mod"] }
}

pub(super) fn start(setup: &Setup) -> Result<Machine> {
    let packages = Packages::ensure("lab-bochs", SUITE, &PACKAGES)?;
    let channel = Pty::open().context("cannot make a terminal for the lab")?;
    let command_line = format!("{COMMAND_LINE} tsc_early_khz={}", INSTRUCTIONS_PER_SECOND / 1000);
    let cdrom = iso::make(&packages, setup, &command_line).context("cannot make the lab's boot image")?;
    let disk = File::open(&setup.kernels).context("cannot open the lab's disk")?;
    let config = text(&configuration(&cdrom, &disk, &channel.far))?;
    // Debian's Bochs has its debugger, which waits to be told to go on.
    let debugger = text("continue\n")?;
    let mut bochs = command(&packages, &config, &debugger)?;
    inherit(&mut bochs, vec![cdrom, disk, config, debugger, channel.far]);
    let mut emulator = Emulator::start(&mut bochs)?;
    screen::drain(emulator.0.id());
    let stderr = emulator.0.stderr.take().context("Bochs has no standard error")?;
    let input = channel.near.try_clone().context("cannot share the lab's terminal")?;
    let log = Some(copy_log(stderr, setup.log.try_clone().context("cannot share the lab's log")?));
    Ok(Machine { emulator, output: Box::new(Output { channel: channel.near, log }), input: Box::new(input) })
}

fn command(packages: &Packages, config: &File, debugger: &File) -> Result<Command> {
    let mut bochs = packages.command("usr/bin/bochs-bin")?;
    bochs.arg("-q").arg("-f").arg(inherited(config)).arg("-rc").arg(inherited(debugger));
    // The paths of the ROMs are relative to the packages, so that no character of them can upset the configuration.
    bochs.current_dir(packages.path(""));
    bochs.env("LTDL_LIBRARY_PATH", packages.path("usr/lib/x86_64-linux-gnu/bochs/plugins"));
    bochs.env("BXSHARE", packages.path("usr/share/bochs"));
    bochs.env("TERM", "xterm").env("TERMINFO", packages.path("lib/terminfo"));
    bochs.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Ok(bochs)
}

/// The Bochs configuration file. The kernel's console and Bochs's own log are standard error.
fn configuration(cdrom: &File, disk: &File, channel: &File) -> String {
    let (cdrom, disk, channel) = (inherited(cdrom), inherited(disk), inherited(channel));
    format!(
        "cpu: count=1, model=corei7_skylake_x, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0\n\
         memory: guest=2048, host=2048\n\
         romimage: file=usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=usr/share/bochs/VGABIOS-lgpl-latest\n\
         plugin_ctrl: speaker=0, gameport=0, parallel=0, iodebug=0\n\
         display_library: term\n\
         config_interface: textconfig\n\
         clock: sync=none, time0=utc\n\
         boot: cdrom\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path={cdrom}, status=inserted\n\
         ata0-slave: type=disk, path={disk}, mode=volatile, journal=/tmp/vmm-lab, heads=16, spt=32\n\
         com1: enabled=1, mode=file, dev=/proc/self/fd/2\n\
         com2: enabled=1, mode=term, dev={channel}\n\
         log: /proc/self/fd/2\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n"
    )
}

/// The path by which a process opens a file that it inherited.
fn inherited(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Has the command's process inherit these files. They close here when the command is dropped.
fn inherit(command: &mut Command, files: Vec<File>) {
    let keep = move || files.iter().try_for_each(|file| clear_close_on_exec(file.as_raw_fd()));
    // SAFETY: between fork and exec the closure only calls fcntl, which is async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(keep) };
}

fn clear_close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file without a name with this text.
fn text(text: &str) -> Result<File> {
    let mut file = tempfile::tempfile().context("cannot make a file for Bochs")?;
    file.write_all(text.as_bytes()).context("cannot write a file for Bochs")?;
    Ok(file)
}

/// Copies what Bochs and the kernel have to say until Bochs ends. A log that can't be written is not worth the run.
fn copy_log(mut from: ChildStderr, mut to: File) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
    })
}

/// The channel's output. It ends when the log is complete, so that an error message can quote it.
struct Output {
    channel: File,
    log: Option<JoinHandle<()>>,
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.channel.read(buffer) {
            // The far end was closed: tty_ioctl(4) has no end of file for the near one.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                let _ = self.log.take().map(JoinHandle::join);
                Ok(0)
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    #[test]
    fn the_configuration_names_inherited_files_only() {
        let file = tempfile::tempfile().unwrap();
        let config = configuration(&file, &file, &file);
        assert_eq!(config.matches(&inherited(&file)).count(), 3);
    }

    #[test]
    fn a_child_opens_what_it_inherits_under_the_same_number() {
        let mut file = text("handed down").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut cat = Command::new("cat");
        cat.arg(inherited(&file));
        inherit(&mut cat, vec![file]);
        assert_eq!(cat.output().unwrap().stdout, b"handed down");
    }

    #[test]
    fn output_ends_when_the_far_end_is_closed() {
        let pty = Pty::open().unwrap();
        let mut far = pty.far;
        far.write_all(b"\x00\xff\r\n\x03").unwrap();
        drop(far);
        let mut bytes = Vec::new();
        Output { channel: pty.near, log: None }.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"\x00\xff\r\n\x03");
    }
}
