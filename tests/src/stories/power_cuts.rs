//! Stories of power cuts: a file system on a device, snapshots in it, and what is there afterwards.

use crate::crash::{generation, whole};
use crate::guests::Guest;
use crate::power::{self, Cut, Device, Entry, Logged};
use crate::vm::TestVm;
use anyhow::{Context, Result, anyhow, ensure};
use snapshot::GenerationId;
use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, ScopedJoinHandle};

/// Of the file system.
const MIB: u32 = 24;
/// Without what ext4 does for those who rename over a file and sync nothing.
const OPTIONS: &CStr = c"nodiscard,noauto_da_alloc";
/// Snapshots alone, with the disks, and while the machine runs: names of files, and how they are taken.
const WAYS: [(&str, &[&str]); 3] =
    [("alone", &[]), ("disks", &["--with-disks", "--digest-disks"]), ("live", &["--live"])];
/// How often each is taken.
const TIMES: usize = 4;

/// Snapshots are taken again and again under the same names, on ext4. Wherever the power is cut, under each name is the one that was
/// last told to be there, or a newer one, whole. That a writer who leaves out a sync would be noticed is seen too. About `most`
/// power cuts are made, of those with `parts` random ones at each write.
///
/// # Errors
/// A snapshot is lost or damaged.
pub fn power_cuts(most: usize, parts: u64, dir: &Path) -> Result<()> {
    let taken = Taken::on_a_logged_device(dir)?;
    let [begin, careless, end] = ["begin", "careless", "end"].map(|word| taken.mark(word));
    let (begin, careless, end) = (begin?, careless?, end?);
    let all = power::cuts(&taken.entries, begin..careless, parts);
    // Shortly before it is told there may be a newer one, and hardly ever else.
    let is_near = |cut: &Cut| taken.entries.get(cut.at).is_some_and(|entry| entry.mark.is_some());
    let step = all.len().div_ceil(most).max(1);
    let chosen = all.iter().enumerate().filter(|(number, cut)| number % step == 0 || is_near(cut));
    let chosen: Vec<_> = chosen.map(|(_, cut)| cut).collect();
    let sites = Site::for_each_processor(dir)?;
    let newer = taken.check_all(&chosen, &sites)?;
    let told = chosen.len() - newer;
    let flushes = taken.entries.iter().filter(|entry| entry.flushes).count();
    println!(
        "power cuts: {} of {} on a device with {} writes and {flushes} flushes: {told} with the snapshots last told, {newer} with a newer one",
        chosen.len(),
        all.len(),
        taken.entries.len() - flushes,
    );
    ensure!(told > 0 && newer > 0, "the cuts are all on one side");
    let torn =
        power::cuts(&taken.entries, careless..end, 0).iter().any(|cut| taken.check(cut, &sites[0]).is_err());
    ensure!(torn, "a writer who syncs nothing does no harm: these cuts show nothing");
    Ok(())
}

/// What happened to the device, and the snapshots that were taken meanwhile.
struct Taken {
    base: Vec<u8>,
    entries: Vec<Entry>,
    /// For each way, in their order.
    generations: [Vec<GenerationId>; 3],
}

impl Taken {
    fn on_a_logged_device(dir: &Path) -> Result<Self> {
        let [data, log, files] = ["data", "log", "files"].map(|name| dir.join(name));
        power::make_file_system(&data, MIB)?;
        File::create(&log)?.set_len(1 << 30)?;
        fs::create_dir(&files)?;
        let base = fs::read(&data)?;
        // The module makes the device mapper's node.
        ensure!(Command::new("modprobe").arg("dm-log-writes").status()?.success(), "no log-writes target");
        let devices = [Device::of(&data)?, Device::of(&log)?];
        let logged = Logged::new("logged", devices[0].node(), devices[1].node())?;
        let generations = power::mounted(logged.device(), &files, OPTIONS, || {
            logged.mark("begin")?;
            let generations = take(&files, dir, &logged)?;
            logged.mark("careless")?;
            replace_carelessly(&files)?;
            logged.mark("end")?;
            Ok(generations)
        })?;
        drop(logged);
        Ok(Self { base, entries: power::read(&log)?, generations })
    }

    /// How many entries come before that mark.
    fn mark(&self, word: &str) -> Result<usize> {
        let place = self.entries.iter().position(|entry| entry.mark.as_deref() == Some(word));
        place.with_context(|| format!("no mark {word} in the log"))
    }

    /// How many snapshots of that name had been told to be there.
    fn told(&self, name: &str, at: usize) -> usize {
        let marks = self.entries[..at].iter().filter_map(|entry| entry.mark.as_deref());
        marks.filter(|mark| *mark == name).count()
    }

    /// After how many of the cuts one of the snapshots is newer than was told; each site has its share of them.
    fn check_all(&self, cuts: &[&Cut], sites: &[Site]) -> Result<usize> {
        thread::scope(|scope| {
            let begin = |(first, site)| {
                let share = cuts.iter().skip(first).step_by(sites.len());
                scope.spawn(move || share.map(|cut| self.check(cut, site).map(usize::from)).sum())
            };
            let workers: Vec<_> = sites.iter().enumerate().map(begin).collect();
            workers.into_iter().map(joined).sum()
        })
    }

    /// Whether one of the snapshots is newer than was told.
    fn check(&self, cut: &Cut, site: &Site) -> Result<bool> {
        site.device.write(&cut.apply(&self.base, &self.entries))?;
        let look = || self.is_newer(cut.at, &site.left);
        let seen = power::mounted(site.device.node(), &site.left, OPTIONS, look);
        seen.with_context(|| format!("cut at {}, {:?}", cut.at, cut.luck))
    }

    /// The same of the file system at `left`.
    fn is_newer(&self, at: usize, left: &Path) -> Result<bool> {
        let mut newer = false;
        for ((name, _), generations) in WAYS.iter().zip(&self.generations) {
            let (told, path) = (self.told(name, at), left.join(name));
            if told == 0 && !path.exists() {
                continue;
            }
            whole(&path).with_context(|| format!("{told} of `{name}` were told to be there"))?;
            let found = generations.iter().position(|known| generation(&path).ok() == Some(*known));
            let found = found.context("a snapshot that nobody took")? + 1;
            ensure!(found >= told, "{told} of `{name}` were told to be there, and number {found} is");
            newer |= found > told;
        }
        Ok(newer)
    }
}

fn joined(worker: ScopedJoinHandle<'_, Result<usize>>) -> Result<usize> {
    worker.join().map_err(|_| anyhow!("a check has panicked"))?
}

/// A device that is left by one power cut after another, and where its files are then.
struct Site {
    device: Device,
    left: PathBuf,
}

impl Site {
    fn for_each_processor(dir: &Path) -> Result<Vec<Self>> {
        (0..thread::available_parallelism()?.get()).map(|number| Self::new(dir, number)).collect()
    }

    fn new(dir: &Path, number: usize) -> Result<Self> {
        let [image, left] = ["image", "left"].map(|name| dir.join(format!("{name}-{number}")));
        File::create(&image)?.set_len(u64::from(MIB) << 20)?;
        fs::create_dir(&left)?;
        Ok(Self { device: Device::of(&image)?, left })
    }
}

/// Each way, again and again.
fn take(files: &Path, dir: &Path, logged: &Logged) -> Result<[Vec<GenerationId>; 3]> {
    let disk = dir.join("disk");
    fs::write(&disk, [[7; 8192], [0; 8192], [9; 8192]].concat())?;
    let guest = Guest::bare("dirty", dir)?.memory("18M").cmdline("size=1 lines=20");
    let guest = guest.argument("--disk", &format!("path={},id=data", disk.display()));
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut generations = [const { Vec::new() }; 3];
    for _ in 0..TIMES {
        for ((name, arguments), generations) in WAYS.iter().zip(&mut generations) {
            vm.wait_for(guest.pulse)?;
            let path = files.join(name);
            vm.ask("snapshot", &[&[path.to_str().context("path")?], *arguments].concat())?;
            logged.mark(name)?;
            generations.push(generation(&path)?);
        }
    }
    vm.ask("stop", &[])?;
    vm.wait()?;
    Ok(generations)
}

/// As a program does that has never heard of fsync; what it did to the directory gets to the disk somehow.
fn replace_carelessly(files: &Path) -> Result<()> {
    let [snapshot, copy] = [WAYS[0].0, "copy"].map(|name| files.join(name));
    let (bytes, file) = (fs::read(&snapshot)?, File::create(&copy)?);
    file.set_len(bytes.len() as u64)?;
    for (number, page) in (0..).zip(bytes.chunks(4096)) {
        // There is no room for zeroes.
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, number * 4096)?;
        }
    }
    fs::rename(&copy, &snapshot)?;
    Ok(File::open(files)?.sync_all()?)
}
