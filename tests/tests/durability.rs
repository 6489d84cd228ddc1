//! Never a wrong machine: whatever interrupts a snapshot, under its name is the old one whole or the new one whole.
//!
//! The real `vmm` takes a snapshot, and each of its system calls that change a file goes wrong in turn. These tests need a
//! `/dev/kvm` and the right to trace, and fail without.

use anyhow::{Context, Result, ensure};
use libc::{EINTR, EIO, ENOSPC, EOPNOTSUPP};
use vmm_tests::crash::{Change, Done, Fate, Found, Luck, Scene, Way};
use vmm_tests::effort;

/// Those that a signal may interrupt, by their manual pages.
const CAN_BE_INTERRUPTED: [&str; 6] = ["open", "write", "pwrite64", "ftruncate", "fallocate", "fsync"];

/// The calls that there are to go wrong.
fn calls(way: Way) -> Result<Vec<&'static str>> {
    let attempt = Scene::new(way)?.again(None)?;
    attempt.answer?;
    let calls: Vec<_> = attempt.done.iter().map(|done| done.name).collect();
    ensure!(calls.contains(&"pwrite64") && calls.contains(&"fsync"), "only these calls were seen: {calls:?}");
    ensure!(calls.contains(&"fdatasync") == (way == Way::ByThreads), "{way:?}: {calls:?}");
    Ok(calls)
}

#[test]
fn killed_at_every_system_call() -> Result<()> {
    for way in Way::ALL {
        let calls = calls(way)?;
        let mut found = Vec::new();
        for nth in 0..calls.len() {
            let mut scene = Scene::new(way)?;
            let attempt = scene.again(Some((nth, Fate::Killed)))?;
            ensure!(attempt.answer.is_err(), "call {nth}: a process that is dead answers");
            scene.was_killed().with_context(|| format!("call {nth}"))?;
            found.push(scene.found().with_context(|| format!("killed at call {nth}"))?);
        }
        let turn = found.iter().position(|&found| found == Found::New).context("always the old one")?;
        ensure!(found[turn..].iter().all(|&found| found == Found::New), "{found:?}");
        println!("{way:?}: killed before each of {} calls, the new one from call {turn} on", calls.len());
    }
    Ok(())
}

#[test]
fn the_power_is_cut_at_every_system_call() -> Result<()> {
    for way in Way::ALL {
        let scene = Scene::new(way)?;
        let before = scene.disk()?;
        let attempt = scene.again(None)?;
        attempt.answer?;
        let parts = 1..=effort::of(20, 500) as u64;
        let lucks = [Luck::Worst, Luck::OnlyNames, Luck::Best].into_iter().chain(parts.map(Luck::Some));
        let mut cuts = 0;
        for luck in lucks {
            for cut in 0..=attempt.done.len() {
                let found = scene.after_a_power_cut(&before, &attempt.done, cut, luck)?;
                let told = cut == attempt.done.len();
                ensure!(
                    !told || found == Found::New,
                    "the new one was told to be there, and is lost: {luck:?}"
                );
                cuts += 1;
            }
        }
        println!("{way:?}: {cuts} power cuts");
    }
    Ok(())
}

/// That the power cuts above would show it: if a file isn't synced, or at last the directory, one of them leaves neither snapshot
/// whole, or loses the new one.
#[test]
fn a_sync_that_is_left_out_is_noticed() -> Result<()> {
    for way in Way::ALL {
        let done = Scene::new(way)?.again(None)?.done;
        let last = done.iter().rposition(|done| matches!(done.change, Some(Change::DirectorySynced)));
        let syncs = (0..done.len()).filter(|&nth| is_needed(&done[nth]));
        let syncs: Vec<_> = syncs.chain(last).collect();
        ensure!(syncs.len() == 2 + usize::from(way == Way::WithDisks), "{done:?}");
        for nth in syncs {
            ensure!(without(way, nth)?, "call {nth} of {way:?} can be left out");
        }
    }
    Ok(())
}

/// A file is on the disk with it. What is synced on the way there only has the disk at work early.
fn is_needed(done: &Done) -> bool {
    matches!(done.change, Some(Change::Synced { .. })) && done.name == "fsync"
}

/// Whether a power cut does harm if this call is not made.
fn without(way: Way, nth: usize) -> Result<bool> {
    let scene = Scene::new(way)?;
    let before = scene.disk()?;
    let attempt = scene.again(Some((nth, Fate::Pretends)))?;
    attempt.answer?;
    let end = attempt.done.len();
    let found = |cut, luck| scene.after_a_power_cut(&before, &attempt.done, cut, luck);
    let torn = (0..=end).any(|cut| found(cut, Luck::OnlyNames).is_err());
    Ok(torn || found(end, Luck::Worst)? == Found::Old)
}

/// What can't be had is told in a line; the old snapshot stays, no other file does, and the machine runs on.
#[test]
fn every_system_call_fails() -> Result<()> {
    for way in Way::ALL {
        let calls = calls(way)?;
        let mut scene = Scene::new(way)?;
        for errno in [ENOSPC, EIO] {
            for nth in 0..calls.len() {
                let attempt = scene.again(Some((nth, Fate::Fails(errno))))?;
                let what = || format!("{errno} at call {nth} of {way:?}: {:?}", attempt.answer);
                let found = scene.found().with_context(what)?;
                let told = attempt.answer.as_ref().err().map(|error| format!("{error:#}"));
                // What only tidies up may fail unseen.
                ensure!(told.is_some() || found == Found::New, what());
                if let Some(told) = told {
                    let names = told.contains(scene.path().to_str().context("path")?);
                    ensure!(names && told.trim().lines().count() == 1, what());
                }
                scene.lives().with_context(what)?;
                match found {
                    Found::Old => scene.is_tidy().with_context(what)?,
                    // Disks of the old one that can't be removed, or that a power cut may bring back with it, stay.
                    Found::New => scene = Scene::new(way)?,
                }
            }
        }
    }
    Ok(())
}

/// A call that is interrupted is made again, one that does half is finished.
#[test]
fn calls_that_are_interrupted_or_do_half() -> Result<()> {
    for way in Way::ALL {
        let calls = calls(way)?;
        let mut scene = Scene::new(way)?;
        for fate in [Fate::Fails(EINTR), Fate::Short] {
            for (nth, _) in calls.iter().enumerate().filter(|(_, call)| CAN_BE_INTERRUPTED.contains(call)) {
                let attempt = scene.again(Some((nth, fate)))?;
                let what = || format!("{fate:?} at call {nth} of {way:?}: {:?}", attempt.answer);
                ensure!(attempt.answer.is_ok() && scene.found()? == Found::New, what());
                scene.lives().and_then(|()| scene.is_tidy()).with_context(what)?;
            }
        }
    }
    Ok(())
}

/// The first call makes a file that has no name; where there are none, an unfinished one has a name that says so.
#[test]
fn a_file_system_without_nameless_files() -> Result<()> {
    for way in Way::ALL {
        let mut scene = Scene::new(way)?;
        let attempt = scene.again(Some((0, Fate::KeepsFailing(EOPNOTSUPP))))?;
        ensure!(attempt.answer.is_err(), "nothing can be opened, and it says: {:?}", attempt.answer);
        ensure!(scene.found()? == Found::Old);
        let attempt = scene.again(Some((0, Fate::Fails(EOPNOTSUPP))))?;
        attempt.answer?;
        let made = attempt.done.iter().find_map(|done| done.change.clone());
        ensure!(matches!(made, Some(Change::Created { path: Some(_), .. })), "{made:?}");
        ensure!(scene.found()? == Found::New);
        scene.lives()?;
        scene.is_tidy()?;
    }
    Ok(())
}
