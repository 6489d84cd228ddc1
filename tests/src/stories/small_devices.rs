//! Stories of the devices that need nothing of the host: entropy, balloon, console.
//!
//! In: a Linux guest, a directory. Out: nothing, or why the story failed. Holds: what the guest does is typed on its virtio
//! console, so that each step is known to have begun after the one before.

use crate::guests::Guest;
use crate::vm::{LIMIT, TestVm};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};

/// What the guest does, with the console open throughout, since a terminal that is closed forgets what was typed: `fill` and
/// `free` for 48 MiB in its tmpfs, in huge pages, since a guest reports no smaller pieces (`pageblock_order` in its mm/page_reporting.c), and
/// of small pages it is chance how many lie together when they are free; `draw` for 16 bytes of the device's entropy, behind what the kernel has read in advance and
/// twins have in common.
pub const OBEY: &str = "fill() { yes | head -c 50331648 > /tmp/big; grep ShmemHugePages /proc/meminfo; }; free() { rm /tmp/big; }; \
     draw() { head -c 4096 /dev/hwrng | tail -c 16 | od -An -tx1 | tr -d ' '; }; \
     mount -o remount,huge=always /tmp || echo FAIL huge; \
     cat /sys/class/misc/hw_random/rng_current; exec 0<>/dev/hvc0 1>&0; echo listening; \
     while read -r word; do echo $word: $($word) done; done";

const FILLED: u64 = 48 << 20;
/// Of that, what is given back at least: a page that somebody else has had since keeps a piece.
const GIVEN_BACK: u64 = FILLED / 4 * 3;

fn with_devices(guest: &Guest) -> Guest {
    guest.clone().switch("--rng").switch("--balloon").argument("--console", "virtio")
}

/// All of them at once: entropy is drawn, typed words are obeyed, memory goes to the host and comes back, before a restore and
/// after it; what was given back is not in the snapshot.
///
/// # Errors
/// One of them does not work.
pub fn small_devices(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&with_devices(guest).run_args())?;
    vm.wait_for("virtio_rng.")?;
    vm.wait_for("listening")?;
    draw(&mut vm)?;
    gives_memory(&mut vm)?;
    reports_free_memory(&mut vm, dir)?;
    vm.snapshot_and_stop(&file)?;
    let mut twins = [TestVm::restore(&file)?, TestVm::restore(&file)?];
    let [one, other] = [draw(&mut twins[0])?, draw(&mut twins[1])?];
    ensure!(one != other, "twins draw the same bytes: {one}");
    let [mut vm, _] = twins;
    gives_memory(&mut vm)?;
    reports_free_memory(&mut vm, dir).context("restored")
}

fn obeys(vm: &mut TestVm, word: &str) -> Result<String> {
    vm.type_line(word)?;
    vm.wait_for(&format!("{word}: "))
}

fn draw(vm: &mut TestVm) -> Result<String> {
    let line = obeys(vm, "draw")?;
    // What stands before and behind may be the serial console's.
    let (_, drawn) = line.split_once("draw: ").context("draw")?;
    let hex: String = drawn.chars().take_while(char::is_ascii_hexdigit).collect();
    ensure!(hex.len() == 32 && hex.chars().any(|digit| digit != '0'), "\"{line}\"");
    Ok(hex)
}

fn gives_memory(vm: &mut TestVm) -> Result<()> {
    for (asked, bytes) in [("64M", 64 << 20), ("0", 0)] {
        vm.ask("balloon", &[asked])?;
        let given = |vm: &TestVm| Ok(vm.ask("status", &[])?["balloon"]["actual_bytes"] == bytes);
        until(vm, given).with_context(|| format!("balloon of {asked}"))?;
    }
    Ok(())
}

/// A file is written and removed: the memory that it took is in a snapshot, and a while later most of it in none.
fn reports_free_memory(vm: &mut TestVm, dir: &Path) -> Result<()> {
    let scratch = dir.join("scratch");
    let told = obeys(vm, "fill")?;
    let huge = told.split_once("ShmemHugePages: ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    ensure!(huge.is_some_and(|kib: u64| kib << 10 >= FILLED), "not all of it is in huge pages: {told}");
    let stored = |vm: &TestVm| -> Result<u64> {
        vm.snapshot(&scratch, "resume")?["stored_bytes"].as_u64().context("stored_bytes")
    };
    let full = stored(vm)?;
    obeys(vm, "free")?;
    let mut least = full;
    until(vm, |vm| {
        least = least.min(stored(vm)?);
        Ok(least + GIVEN_BACK < full)
    })
    .with_context(|| format!("of {full} bytes at least {least} stay in the snapshot"))
}

fn until(vm: &TestVm, mut holds: impl FnMut(&TestVm) -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds(vm)? {
        ensure!(Instant::now() < deadline, "it never happens");
        // A guest that is looked at all the time does not get to run.
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}
