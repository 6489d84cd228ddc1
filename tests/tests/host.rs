//! This host's KVM, with our own guests: fidelity in milliseconds. They run on any `/dev/kvm`, so these tests fail where
//! there is none.

use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSection};
use vmm_tests::autopsy;
use vmm_tests::guests::Guest;
use vmm_tests::stories;
use vmm_tests::vm::{TestVm, program};

fn guest(name: &str, dir: &tempfile::TempDir) -> Guest {
    Guest::bare(name, dir.path()).unwrap()
}

#[test]
fn a_second_process_goes_on_with_the_counter() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::second_process(&guest("counter", &dir), dir.path()).map(drop)
}

#[test]
fn a_restored_machine_is_the_one_that_was_saved() -> Result<()> {
    for name in ["counter", "registers", "timer", "dirty"] {
        let dir = tempfile::tempdir()?;
        stories::capture_again(&guest(name, &dir), dir.path())?;
    }
    Ok(())
}

#[test]
fn so_is_one_with_a_device_that_is_asked_all_the_time() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::capture_again(&guest("entropy", &dir).switch("--rng"), dir.path())
}

#[test]
fn so_is_one_with_2_or_4_vcpus() -> Result<()> {
    for cpus in [2, 4] {
        let dir = tempfile::tempdir()?;
        stories::capture_again(&guest("smp", &dir).cpus(cpus), dir.path())?;
    }
    Ok(())
}

/// Who waits for a guest in vain is told where each vCPU is, and at what its timer; of a VM that is gone, that nothing is known.
#[test]
fn a_guest_that_says_nothing_is_looked_at() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = TestVm::start(&guest("smp", &dir).cpus(2).run_args())?;
    vm.wait_for("round=")?;
    let told = autopsy::of(vm.socket());
    for line in ["vCPU 0 now: rip 0x", "vCPU 0 later: rip 0x", "vCPU 1 now: rip 0x", "vCPU 1 later: rip 0x"] {
        ensure!(told.contains(line), "no \"{line}\" in:\n{told}");
    }
    let gone = dir.path().join("gone");
    ensure!(autopsy::of(&gone).contains("no control socket"), "{}", autopsy::of(&gone));
    vm.wait_for("round=").map(drop)
}

#[test]
fn registers_survive_100_rounds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::rounds(&guest("registers", &dir).cmdline("spins=1000000"), 100, dir.path())
}

#[test]
fn timers_survive_100_rounds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::rounds(&guest("timer", &dir).cmdline("period=2000"), 100, dir.path())
}

#[test]
fn patterned_memory_survives_100_rounds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::rounds(&guest("dirty", &dir).cmdline("size=64 lines=20"), 100, dir.path())
}

#[test]
fn requests_to_a_device_survive_100_rounds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::rounds(&guest("entropy", &dir).switch("--rng").cmdline("rate=100"), 100, dir.path())
}

#[test]
fn every_cpu_survives_100_rounds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::rounds(&guest("smp", &dir).cmdline("lines=20").cpus(4), 100, dir.path())
}

#[test]
fn clones_of_one_command_go_on_by_themselves() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::flock(&guest("counter", &dir), 5, dir.path())
}

#[test]
fn a_working_set_is_written_down_and_fetched_ahead() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = guest("scatter", &dir).memory("128M").cmdline("size=64 every=8");
    stories::works_with_a_part(&guest, 64, dir.path())
}

/// In JSON and in words; a guest that stands still is told of once it runs.
#[test]
fn a_restore_tells_its_times() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::tells_its_times(&guest("counter", &dir).cmdline("rate=100"), dir.path())
}

#[test]
fn a_restore_tells_of_one_that_sleeps() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::tells_of_one_that_sleeps(dir.path())
}

/// The thread that its vCPU has is to make the monitor's.
#[test]
fn a_guest_that_never_exits_can_be_asked_saved_and_ended() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::is_within_reach(&guest("counter", &dir).cmdline("rate=0 every=1000000000000000"), dir.path())
}

/// The other vCPU was never started.
#[test]
fn a_triple_fault_is_told_with_where_each_vcpu_stood() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let said = stories::last_words(&guest("power", &dir).cmdline("do=fault").cpus(2))?;
    let places =
        [said.find("triple fault"), said.find("\nvCPU 0: "), said.find("\nvCPU 1: as after a reset")];
    ensure!(places.iter().all(Option::is_some) && places.is_sorted(), "vmm said: {said}");
    Ok(())
}

#[test]
fn time_advances_or_stands_still_and_never_goes_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::an_hour(&guest("timer", &dir).cmdline("period=2000"), dir.path())
}

#[test]
fn the_exit_status_says_how_a_guest_ended() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ways = [("off", 0), ("panic", 3), ("reset", 4), ("i8042", 4), ("fault", 5), ("exit status=42", 42)];
    for (way, status) in ways {
        stories::ends_with(&guest("power", &dir).cmdline(&format!("do={way}")), status)?;
    }
    Ok(())
}

#[test]
fn a_guest_is_dumped_and_goes_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::dumped(&guest("counter", &dir).cpus(2), dir.path()).map(drop)
}

#[test]
fn a_panic_leaves_a_dump_beside_the_older_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::dumped_by_panic(&guest("power", &dir).cmdline("do=panic"), dir.path()).map(drop)
}

/// In memory, then in files.
#[test]
fn kernels_take_turns() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guests = [guest("counter", &dir), guest("timer", &dir), guest("dirty", &dir).pulse("written=")];
    for files in [None, Some(dir.path())] {
        let turns = stories::take_turns(&guests, 10, files)?;
        assert_eq!(turns.len(), 10);
    }
    Ok(())
}

#[test]
fn a_kernel_that_ends_or_cannot_start_leaves_the_machine_to_the_other() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::nobody_is_lost(&guest("counter", &dir), &guest("power", &dir), dir.path())
}

#[test]
fn a_kernel_does_not_wake_up_to_a_disk_that_changed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::stale_disk(&guest("counter", &dir), &guest("timer", &dir), dir.path())
}

#[test]
fn a_kernel_out_of_a_file_takes_the_place_of_another() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::comes_out_of_a_file(&guest("counter", &dir), &guest("timer", &dir), dir.path())
}

#[test]
fn a_kernel_boots_beside_another_and_takes_over_on_trial() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::boots_beside(&guest("counter", &dir), &guest("timer", &dir), dir.path())?;
    stories::ends_beside(&guest("counter", &dir), &guest("power", &dir).cmdline("do=panic"), dir.path())
}

#[test]
fn an_image_kernel_that_writes_nothing_loses_nobody() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let images = [guest("power", &dir), guest("counter", &dir)];
    stories::without_an_image(&guest("timer", &dir), [&images[0], &images[1]], dir.path())
}

/// From a boot, and from a file that is mapped; the guest looks at every page of its pattern, and so does the one that was saved.
#[test]
fn a_guest_runs_on_while_it_is_saved() -> Result<()> {
    for (name, words, cpus) in [("dirty", "size=64 lines=20", 1), ("smp", "lines=20", 4)] {
        let dir = tempfile::tempdir()?;
        stories::live(&guest(name, &dir).cmdline(words).cpus(cpus), dir.path())?;
    }
    Ok(())
}

#[test]
fn what_is_saved_live_is_what_is_saved_otherwise() -> Result<()> {
    for name in ["registers", "dirty"] {
        let dir = tempfile::tempdir()?;
        stories::live_is_whole(&guest(name, &dir), dir.path())?;
    }
    Ok(())
}

#[test]
fn a_live_snapshot_that_is_given_up_leaves_no_trace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = guest("dirty", &dir).memory("600M").cmdline("size=512 lines=20 verify=0");
    stories::live_leaves_no_trace(&guest, dir.path())
}

/// Of a restored guest most of RAM is copied before it stands still, from when on it is told what it writes.
#[test]
fn what_is_copied_ahead_is_what_is_saved_otherwise() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = guest("dirty", &dir).cmdline("size=96 lines=20 rate=4000");
    stories::ahead_is_whole(&guest, dir.path())?;
    stories::ahead_of_one_that_ends(&guest, &self::guest("counter", &dir), dir.path())
}

#[test]
fn a_copy_ahead_that_is_given_up_leaves_no_trace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = guest("dirty", &dir).cmdline("size=96 lines=20 verify=0");
    stories::ahead_leaves_no_trace(&guest, dir.path())
}

/// Sixteen times: restored, changed, and only that written. What a chain has is what a whole snapshot of the same instant has.
#[test]
fn a_chain_of_16_is_the_machine() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::chain(&guest("dirty", &dir).memory("64M").cmdline("size=32 lines=20"), 16, dir.path())
}

/// The same of one that never stops, after a boot and after a restore; each is restored, and every other one is compared.
#[test]
fn so_is_a_chain_of_16_of_a_guest_that_runs_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::tracked_chain(
        &guest("dirty", &dir).memory("64M").cmdline("size=32 lines=20 rate=4000"),
        15,
        dir.path(),
    )?;
    let dir = tempfile::tempdir()?;
    let entropy = guest("entropy", &dir).switch("--rng").memory("32M").cmdline("rate=100");
    stories::tracked_chain(&entropy, 1, dir.path())
}

#[test]
fn a_parent_that_will_not_do_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stories::refused_parents(&guest("counter", &dir), dir.path())
}

/// By the names that the compiler gives to functions (`vmm/restore.ld`), which another compiler may give otherwise.
#[test]
fn what_a_restore_runs_lies_together() -> Result<()> {
    let bytes = std::fs::read(program())?;
    let file = object::File::parse(bytes.as_slice())?;
    let together = file.section_by_name(".text.restore").context("no such section")?.size();
    ensure!(together > 250 << 10, "only {together} bytes");
    Ok(())
}
