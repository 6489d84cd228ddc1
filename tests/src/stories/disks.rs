//! Stories of disks: what a guest was told is on its disk is there, whatever becomes of its RAM in between.

use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vmm::load;
use vmm::virtio::{DeviceState, SlotState};

/// Runs in the guest, on its disk: a database that tells of each commit once it is durable, while another process writes,
/// reads back without the cache and compares. Each commit ends with a dot, so that a line that was cut off shows.
pub(super) const WORK: &str = r#"
(while :; do
    dd if=/dev/urandom of=/root/churn bs=64k count=16 2>/dev/null
    md5sum /root/churn > /root/sum
    sync
    echo 3 > /proc/sys/vm/drop_caches
    md5sum -c -s /root/sum || echo FAIL churn
done) &
(echo "pragma journal_mode=wal; pragma synchronous=full; create table t(n integer primary key, x);"
n=0
while :; do
    n=$((n + 1))
    echo "insert into t values($n, randomblob(3000)); select 'commit ' || max(n) || '.' from t;"
done) | sqlite3 /root/db
"#;
/// Mounts the disk and does the work.
pub const DO_WORK: &str = "mount -t ext4 /dev/vda /root && sh /root/work";
/// What comes before the number of a commit.
pub(super) const COMMIT: &str = "commit ";

/// A guest with a disk in `dir` that it works on, and Debian's programs on another.
///
/// # Errors
/// The disk can't be made.
pub fn worker(guest: Guest, dir: &Path) -> Result<Guest> {
    worker_with(guest, &dir.join("disk"), WORK)
}

/// The same, with a disk of this name and another script.
pub(super) fn worker_with(guest: Guest, image: &Path, work: &str) -> Result<Guest> {
    ext4(image, work)?;
    let data = format!("path={},id=data", image.display());
    let tools = format!("path={},id=tools,readonly=on", tools_disk()?.display());
    Ok(guest.cmdline("tools=vdb").proof(COMMIT).argument("--disk", &data).argument("--disk", &tools))
}

/// Through rounds of snapshot and restore under load, no commit that the guest was told of is lost, none comes twice, and the
/// file system is whole.
///
/// # Errors
/// A commit is missing on the console or on the disk, or the disk is damaged.
pub fn loses_no_commit(guest: Guest, rounds: usize, dir: &Path) -> Result<()> {
    let guest = worker(guest, dir)?;
    let files = [dir.join("even"), dir.join("odd")];
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut last = 0;
    for round in 0..rounds {
        wait_for_commits(&mut vm, 2)?;
        vm.snapshot(&files[round % 2], "stop")?;
        ensure!(vm.wait()? == 0, "round {round}: the status is not 0");
        last = in_order(&vm, last).with_context(|| format!("round {round}"))?;
        vm = TestVm::restore(&files[round % 2])?;
        if (round + 1) % 10 == 0 {
            println!("{}: {} of {rounds} rounds, at commit {last}", guest.name, round + 1);
        }
    }
    wait_for_commits(&mut vm, 2)?;
    vm.ask("stop", &[])?;
    vm.wait()?;
    last = in_order(&vm, last)?;
    let held = check_disk(&dir.join("disk"), dir)?;
    ensure!(held >= last, "the guest was told of {last} commits, and the disk holds {held}");
    println!("{}: {last} commits told, {held} on the disk", guest.name);
    Ok(())
}

/// A snapshot with its disks goes on again and again from the same commit, though the guest wrote on after it.
///
/// # Errors
/// It goes on elsewhere, or a disk is damaged.
pub fn keeps_its_disk(guest: Guest, dir: &Path) -> Result<()> {
    let guest = worker(guest, dir)?;
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    wait_for_commits(&mut vm, 3)?;
    vm.snapshot_with(&file, "pause", &["--with-disks"])?;
    vm.lines_within(Duration::from_millis(500));
    let last = in_order(&vm, 0)?;
    vm.ask("resume", &[])?;
    wait_for_commits(&mut vm, 3)?;
    vm.ask("stop", &[])?;
    vm.wait()?;
    for copy in ["one", "two"] {
        let place = dir.join(copy);
        let mut vm = TestVm::restore_with(&file, &["--disk", &format!("data={}", place.display())])?;
        wait_for_commits(&mut vm, 3)?;
        vm.ask("stop", &[])?;
        vm.wait()?;
        let told = in_order(&vm, last)?;
        let held = check_disk(&place, dir)?;
        ensure!(held >= told, "{copy}: {told} commits told, {held} on the disk");
    }
    let mut nameless = TestVm::restore(&file)?;
    wait_for_commits(&mut nameless, 3)?;
    in_order(&nameless, last).map(drop)
}

/// A disk stops answering while the guest works on it. The snapshot does not wait for it for ever; what was under way is
/// done by the restored machine, on the disk that was kept, and no commit is lost.
///
/// # Errors
/// Nothing was under way, or it got lost.
pub fn outlives_a_disk_that_hangs(guest: Guest, dir: &Path) -> Result<()> {
    let (file, copy) = (dir.join("snapshot"), dir.join("restored"));
    let slow = FileSystem::new(dir)?;
    let guest = worker_with(guest, &slow.path().join("disk"), WORK)?;
    let mut vm = TestVm::start(&guest.run_args())?;
    wait_for_commits(&mut vm, 3)?;
    slow.freeze(true)?;
    while vm.lines_within(Duration::from_secs(5)).iter().any(|line| line.contains(COMMIT)) {}
    vm.snapshot_with(&file, "stop", &["--with-disks"])?;
    let waiting = unfinished(&file)?;
    println!("  {waiting} requests were under way");
    ensure!(waiting > 0, "no request was under way");
    slow.freeze(false)?;
    ensure!(vm.wait()? == 0, "the status is not 0");
    let last = in_order(&vm, 0)?;

    let mut vm = TestVm::restore_with(&file, &["--disk", &format!("data={}", copy.display())])?;
    wait_for_commits(&mut vm, 3)?;
    vm.ask("stop", &[])?;
    vm.wait()?;
    let told = in_order(&vm, last)?;
    let held = check_disk(&copy, dir)?;
    ensure!(held >= told, "{told} commits told, {held} on the disk");
    Ok(())
}

/// How many requests a snapshot's disks had not finished.
fn unfinished(file: &Path) -> Result<usize> {
    let state = load::state(&load::open(file)?)?;
    let of_disk = |slot: &SlotState| match &slot.device {
        DeviceState::Blk(disk) => disk.device.unfinished.len(),
        _ => 0,
    };
    Ok(state.board.virtio.iter().map(of_disk).sum())
}

/// A file system in a file, which can be frozen: writes to it then wait.
struct FileSystem {
    mount: PathBuf,
}

impl FileSystem {
    fn new(dir: &Path) -> Result<Self> {
        let (image, mount) = (dir.join("slow.img"), dir.join("slow"));
        fs::create_dir(&mount)?;
        run(Command::new("/tools/bin/mke2fs").args(["-q", "-t", "ext4"]).arg(&image).arg("160M"))?;
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&image, &mount]))?;
        Ok(Self { mount })
    }

    fn path(&self) -> &Path {
        &self.mount
    }

    /// `FIFREEZE` and `FITHAW` (ioctl_fs(4)).
    fn freeze(&self, freeze: bool) -> Result<()> {
        const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
        const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
        let directory = fs::File::open(&self.mount)?;
        // SAFETY: neither call reads or writes its argument.
        let done = unsafe { libc::ioctl(directory.as_raw_fd(), if freeze { FIFREEZE } else { FITHAW }, 0) };
        ensure!(
            done == 0,
            "cannot freeze or thaw {}: {}",
            self.mount.display(),
            std::io::Error::last_os_error()
        );
        Ok(())
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // It may not be frozen, and is the lab's in any case, which ends soon.
        let _ = self.freeze(false);
        let _ = run(Command::new("umount").arg(&self.mount));
    }
}

pub(super) fn wait_for_commits(vm: &mut TestVm, count: usize) -> Result<()> {
    (0..count).try_for_each(|_| vm.wait_for(COMMIT).map(drop))
}

/// The last commit that a process told of: each is one more than the one before. The one at which the machine was cut off
/// may have been told half by one process and half by the next, and counts for neither.
fn in_order(vm: &TestVm, before: u64) -> Result<u64> {
    let whole = |line: &String| line.split(COMMIT).nth(1)?.split_once('.')?.0.parse::<u64>().ok();
    let told: Vec<u64> = vm.seen().iter().filter_map(whole).collect();
    let &first = told.first().context("no commit")?;
    ensure!(first == before + 1 || before > 0 && first == before + 2, "commit {first} after {before}");
    let gap = told.windows(2).find(|pair| pair[1] != pair[0] + 1);
    ensure!(gap.is_none(), "commits out of order: {gap:?}");
    Ok(told[told.len() - 1])
}

/// Lets the journal be replayed, as after a power cut, in a copy; then the file system must be clean, and the database whole.
/// Returns how many commits it holds.
pub(super) fn check_disk(image: &Path, dir: &Path) -> Result<u64> {
    let (copy, mount) = (dir.join("copy"), dir.join("mount"));
    fs::copy(image, &copy)?;
    fs::create_dir_all(&mount)?;
    run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&copy, &mount]))?;
    let query = "pragma integrity_check; select count(*) = max(n) from t; select max(n) from t;";
    let answer = run(Command::new("/tools/bin/sqlite3").arg(mount.join("db")).arg(query));
    run(Command::new("umount").arg(&mount))?;
    run(Command::new("/tools/bin/e2fsck").args(["-f", "-n"]).arg(&copy)).context("the file system")?;
    let answer = answer?;
    let [integrity, complete, count] = answer.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("sqlite3 says: {answer}");
    };
    ensure!((integrity, complete) == ("ok", "1"), "the database: {answer}");
    Ok(count.parse()?)
}

/// A disk of 64 MiB with a file system that holds the script.
pub(super) fn ext4(image: &Path, work: &str) -> Result<()> {
    let tree = tempfile::tempdir()?;
    fs::write(tree.path().join("work"), work)?;
    let mut mke2fs = Command::new("/tools/bin/mke2fs");
    run(mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(tree.path()).arg(image).arg("64M")).map(drop)
}

/// The disk that the lab has its tools from.
fn tools_disk() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/lab/kernels"));
    let device =
        line.and_then(|line| line.split(' ').next()).context("no disk with tools: is this the lab?")?;
    Ok(device.into())
}

pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}{complaint}", output.status);
    Ok(said)
}
