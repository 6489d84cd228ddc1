//! Stories of power cuts: a file system on a device, snapshots in it, and what is there afterwards.

use crate::crash::{generation, whole};
use crate::guests::Guest;
use crate::power::{self, Cut, Entry, Logged, Mount};
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use snapshot::GenerationId;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Of the file system.
const MIB: u32 = 24;
/// Without what ext4 does for those who rename over a file and sync nothing.
const OPTIONS: &str = "noatime,nodiscard,noauto_da_alloc";
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
    let mut found = [0; 2];
    for (_, cut) in chosen {
        let newer = taken.check(cut).with_context(|| format!("cut at {}, {:?}", cut.at, cut.luck))?;
        found[usize::from(newer)] += 1;
    }
    let flushes = taken.entries.iter().filter(|entry| entry.flushes).count();
    let [told, newer] = found;
    println!(
        "power cuts: {} of {} on a device with {} writes and {flushes} flushes: {told} with the snapshots last told, {newer} with a newer one",
        told + newer,
        all.len(),
        taken.entries.len() - flushes,
    );
    ensure!(told > 0 && newer > 0, "the cuts are all on one side");
    let torn = power::cuts(&taken.entries, careless..end, 0).iter().any(|cut| taken.check(cut).is_err());
    ensure!(torn, "a writer who syncs nothing does no harm: these cuts show nothing");
    Ok(())
}

/// What happened to the device, and the snapshots that were taken meanwhile.
struct Taken {
    base: Vec<u8>,
    entries: Vec<Entry>,
    /// For each way, in their order.
    generations: [Vec<GenerationId>; 3],
    dir: PathBuf,
}

impl Taken {
    fn on_a_logged_device(dir: &Path) -> Result<Self> {
        let [data, log, files] = ["data", "log", "files"].map(|name| dir.join(name));
        power::make_file_system(&data, MIB)?;
        File::create(&log)?.set_len(1 << 30)?;
        fs::create_dir(&files)?;
        fs::create_dir(dir.join("left"))?;
        let base = fs::read(&data)?;
        // The module makes the device mapper's node.
        ensure!(Command::new("modprobe").arg("dm-log-writes").status()?.success(), "no log-writes target");
        let devices = [power::attach(&data)?, power::attach(&log)?];
        let logged = Logged::new("logged", &devices[0], &devices[1])?;
        let mount = Mount::new(logged.device(), &files, OPTIONS)?;
        logged.mark("begin")?;
        let generations = take(&files, dir, &logged)?;
        logged.mark("careless")?;
        replace_carelessly(&files)?;
        logged.mark("end")?;
        drop(mount);
        drop(logged);
        devices.iter().try_for_each(|device| power::detach(device))?;
        Ok(Self { base, entries: power::read(&log)?, generations, dir: dir.to_owned() })
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

    /// Whether one of the snapshots is newer than was told.
    fn check(&self, cut: &Cut) -> Result<bool> {
        let [image, left] = ["image", "left"].map(|name| self.dir.join(name));
        fs::write(&image, cut.apply(&self.base, &self.entries))?;
        let _mount = Mount::new(&image, &left, &format!("loop,{OPTIONS}"))?;
        let mut newer = false;
        for ((name, _), generations) in WAYS.iter().zip(&self.generations) {
            let (told, path) = (self.told(name, cut.at), left.join(name));
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
