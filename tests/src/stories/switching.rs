//! Stories of kernels that take turns on one machine.
//!
//! In: guests that show their life by different words, a directory. Out: how long each switch took, or why the story failed.
//! Holds: a guest that slept goes on with the next number, in the same boot.

use crate::bench::Cost;
use crate::floor::Floor;
use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// What a Linux guest runs to show its life, around the words that stand before the number: in a file of its tmpfs, so that
/// this lives on as well.
pub const TELL_LIFE: [&str; 2] = [
    "echo 0 > /tmp/n; while sleep 0.2; do echo $(($(cat /tmp/n) + 1)) > /tmp/n; echo ",
    "$(cat /tmp/n) boot_id=$(cat /proc/sys/kernel/random/boot_id); done",
];

/// One switch that was made.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Whose turn it became.
    pub to: String,
    /// How long nobody ran, in milliseconds.
    pub pause_ms: f64,
    /// Of that, writing the one that fell asleep to its file.
    pub saved_ms: f64,
}

/// A life that is followed from turn to turn.
#[derive(Clone)]
pub(super) struct Life<'a> {
    guest: &'a Guest,
    beat: Option<u64>,
    boot: Option<String>,
}

/// So many switches around the guests, each kept in memory while it sleeps, or in a file.
///
/// # Errors
/// A guest doesn't go on where it was.
pub fn take_turns(guests: &[Guest], count: usize, files: Option<&Path>) -> Result<Vec<Turn>> {
    let mut vm = TestVm::start(&guests[0].run_args())?;
    let mut lives: Vec<_> = guests.iter().map(Life::of).collect();
    lives[0].goes_on(&mut vm)?;
    let mut turns = Vec::new();
    for number in 1..=count {
        let next = number % guests.len();
        let keep = files.map(|dir| dir.join(format!("sleeper-{}", (number - 1) % guests.len())));
        turns.push(switch(&mut vm, &guests[next], number < guests.len(), keep.as_deref())?);
        lives[next].goes_on(&mut vm).with_context(|| format!("after switch {number}"))?;
    }
    all_are_there(&vm, guests.len())?;
    Ok(turns)
}

fn switch(vm: &mut TestVm, guest: &Guest, boots: bool, keep: Option<&Path>) -> Result<Turn> {
    let mut args = if boots { guest.switch_args() } else { vec!["--to".to_owned(), guest.word()] };
    if let Some(file) = keep {
        args.extend(["--keep-in".to_owned(), file.display().to_string()]);
    }
    switch_with(vm, guest, &args)
}

pub(super) fn switch_with(vm: &mut TestVm, guest: &Guest, args: &[String]) -> Result<Turn> {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let told = vm.ask("switch", &args)?;
    ensure!(told["to"] == guest.word(), "{told}");
    // The line that the other was cut off in ends here.
    vm.wait_for(&format!("sleeps, `{}` runs", guest.word()))?;
    let ms = |name: &str| told[name].as_f64().with_context(|| format!("{name} in {told}"));
    Ok(Turn { to: guest.word(), pause_ms: ms("pause_ms")?, saved_ms: ms("saved_ms")? })
}

fn all_are_there(vm: &TestVm, count: usize) -> Result<()> {
    let told = vm.ask("kernels", &[])?;
    let kernels = told["kernels"].as_array().context("a list")?;
    let asleep = kernels.iter().filter(|kernel| kernel["asleep"] == true).count();
    ensure!(kernels.len() == count && asleep == count - 1, "{told}");
    Ok(())
}

/// Whether this is the beginning of that number: a switch cuts lines, and what follows may be another's.
fn is_cut(beat: u64, number: u64) -> bool {
    beat < number && number.to_string().starts_with(&beat.to_string())
}

impl<'a> Life<'a> {
    /// Nothing is known of it yet.
    pub(super) fn of(guest: &'a Guest) -> Self {
        Self { guest, beat: None, boot: None }
    }

    /// Three more beats, each the next; in the same boot if the guest tells it.
    pub(super) fn goes_on(&mut self, vm: &mut TestVm) -> Result<()> {
        for _ in 0..3 {
            let line = vm.wait_for(self.guest.pulse)?;
            let beat = self.guest.beat(&line)?;
            if self.beat.is_some_and(|last| is_cut(beat, last + 1)) {
                continue;
            }
            let last = self.beat.replace(beat);
            ensure!(last.is_none_or(|last| beat > last), "{}: {beat} follows {last:?}", self.guest.name);
            let boot = line.split("boot_id=").nth(1).map(str::to_owned);
            ensure!(self.boot.is_none() || self.boot == boot, "{}: another boot: {line}", self.guest.name);
            self.boot = boot;
        }
        Ok(())
    }
}

/// A kernel that ends leaves the machine to the one that sleeps; one that can't be booted leaves it where it was.
///
/// # Errors
/// The other one doesn't go on.
pub fn nobody_is_lost(guest: &Guest, other: &Guest, dir: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    let mut life = Life::of(guest);
    life.goes_on(&mut vm)?;
    let nothing = dir.join("nothing");
    std::fs::write(&nothing, "no kernel")?;
    let refused = vm.ask("switch", &["--kernel", nothing.to_str().context("path")?]);
    ensure!(refused.is_err(), "a text file is booted");
    let unknown = vm.ask("switch", &["--to", "nobody"]).err().context("nobody runs")?;
    ensure!(unknown.to_string().contains("nobody"), "{unknown:#}");
    life.goes_on(&mut vm).context("after a refusal")?;
    switch(&mut vm, other, true, None)?;
    vm.wait_for("goes on")?;
    life.goes_on(&mut vm).context("after the other's end")
}

/// A kernel does not wake up to a disk that changed while it slept, whether it had the disk first or got it from another; it can
/// be dropped, and the other goes on.
///
/// # Errors
/// It wakes up, or the reason doesn't name the disk, or the other doesn't go on.
pub fn stale_disk(guest: &Guest, other: &Guest, dir: &Path) -> Result<()> {
    let disk = dir.join("disk");
    std::fs::write(&disk, [0; 1 << 20])?;
    let guest = guest.clone().argument("--disk", &format!("{},id=data", disk.display()));
    let mut vm = TestVm::start(&guest.run_args())?;
    Life::of(&guest).goes_on(&mut vm)?;
    let share = [other.switch_args(), vec!["--share-disks".to_owned()]].concat();
    switch_with(&mut vm, other, &share)?;
    std::fs::write(&disk, [1; 1 << 20])?;
    is_stale(&mut vm, &guest)?;
    Life::of(other).goes_on(&mut vm).context("after a refusal")?;
    vm.ask("forget", &[&guest.word()])?;
    all_are_there(&vm, 1)?;
    vm.ask("stop", &[])?;
    vm.wait()?;

    let mut vm = TestVm::start(&guest.run_args())?;
    Life::of(&guest).goes_on(&mut vm)?;
    switch_with(&mut vm, other, &share)?;
    switch_with(&mut vm, &guest, &["--to".to_owned(), guest.word()]).context("nobody wrote the disk")?;
    std::fs::write(&disk, [2; 1 << 20])?;
    is_stale(&mut vm, other)
}

fn is_stale(vm: &mut TestVm, guest: &Guest) -> Result<()> {
    let refused =
        vm.ask("switch", &["--to", &guest.word()]).err().context("it wakes up to a changed disk")?;
    ensure!(refused.to_string().contains("its disk `data` was written while it slept"), "{refused:#}");
    Ok(())
}

/// Two guests of one size, with so many bytes of RAM each, that are to be switched between.
pub type Pair = ([Guest; 2], u64);

/// So many switches between the two guests of each pair, both resident, and as many runs of the floor, all by turns.
///
/// # Errors
/// A guest doesn't go on where it was, or the floor can't be measured.
pub fn switch_cost<const N: usize>(pairs: &[Pair; N], count: usize) -> Result<[Cost; N]> {
    let mut resident = Vec::new();
    for (guests, memory) in pairs {
        let mut vm = TestVm::start(&guests[0].run_args())?;
        let mut lives = guests.each_ref().map(Life::of);
        lives[0].goes_on(&mut vm)?;
        switch(&mut vm, &guests[1], true, None)?;
        lives[1].goes_on(&mut vm)?;
        resident.push((vm, lives, Floor::new(*memory)?));
    }
    let mut costs = std::array::from_fn(|_| Cost::default());
    for number in 0..count {
        for ((vm, lives, floor), cost) in resident.iter_mut().zip(&mut costs) {
            cost.floors.push(floor.measure()?.answered.as_secs_f64() * 1e3);
            let life = &mut lives[number % 2];
            let turn = switch(vm, life.guest, false, None);
            cost.times.push(turn.with_context(|| vm.last_lines())?.pause_ms);
            life.goes_on(vm)?;
        }
    }
    Ok(costs)
}
