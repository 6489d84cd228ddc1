//! Tells the stories of stock Linux guests where Linux runs: in the lab, or on a host with a KVM of the common kind.
//!
//! Arguments: names of stories, or of groups (`6.12`, `6.12/rounds`); none lists them. Prints a line for each story and
//! ends with status 1 if one failed.

use anyhow::{Result, bail};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use vmm_tests::bench::{Report, two_sizes};
use vmm_tests::guests::{Guest, LINUX};
use vmm_tests::stories::{self, After, End, Gap};
use vmm_tests::{lost, vm};

/// What makes a Linux kernel panic.
const PANIC: &str = "echo c > /proc/sysrq-trigger";
/// Our own guests that are torn out of their work again and again.
const ROUNDED: [&str; 5] = ["registers", "timer", "dirty", "smp", "entropy"];

type Story = Box<dyn Fn(&Path) -> Result<()>>;

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let chosen: Vec<_> =
        all().into_iter().filter(|(name, _)| wanted.iter().any(|w| is_in(name, w))).collect();
    let unknown = |wanted: &&String| !chosen.iter().any(|(name, _)| is_in(name, wanted));
    if let Some(unknown) = wanted.iter().find(unknown) {
        println!("no story is called {unknown}");
        return ExitCode::from(2);
    }
    if chosen.is_empty() {
        all().iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::from(2);
    }
    let mut spare = 1;
    let failed = chosen.iter().filter(|(name, story)| !tell(name, story, &mut spare)).count();
    println!("stories: {} passed, {failed} failed", chosen.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether the name is the wanted one, or in the group of that name.
fn is_in(name: &str, wanted: &str) -> bool {
    name.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether it is true. A guest that is lost is made good for as long as there is one to `spare`.
fn tell(name: &str, story: &Story, spare: &mut usize) -> bool {
    let started = Instant::now();
    vm::ended_by_themselves();
    let told = tempfile::tempdir().map_err(Into::into).and_then(|dir| story(dir.path()));
    let seconds = started.elapsed().as_secs_f64();
    let Err(error) = told.map_err(|error| format!("{error:#}")) else {
        println!("story {name} ... ok ({seconds:.1} s)");
        return true;
    };
    let words = vm::ended_by_themselves();
    let again = *spare > 0 && words.iter().chain([&error]).any(|said| lost::by_the_lab(said));
    let how = if again { "lost its guest, and is told once more" } else { "FAILED" };
    println!("story {name} ... {how} ({seconds:.1} s)\n{error}");
    words.iter().for_each(|said| println!("one that had ended said last:\n{said}"));
    if again {
        *spare -= 1;
    }
    again && tell(name, story, spare)
}

fn all() -> Vec<(String, Story)> {
    let mut stories: Vec<(String, Story)> = Vec::new();
    for version in LINUX {
        let mut add = |name: &str, story: Story| stories.push((format!("{version}/{name}"), story));
        let linux = move |run: &str| Guest::linux(version, run);
        add("restart", Box::new(move |dir| stories::same_boot(&linux(stories::TELL_BOOT_ID), dir)));
        let telling = move || linux(stories::TELL_BOOT_ID).cpus(2).proof("boot_id ");
        add("by-stub", Box::new(move |dir| stories::by_stub(&telling(), dir)));
        add(
            "expect-kernel",
            Box::new(move |dir| stories::knows_its_kernel(&linux("").image("vmlinuz"), dir)),
        );
        add("stub-rate", Box::new(move |dir| stories::stub_rate(&linux(""), dir)));
        add("poweroff", Box::new(move |_| stories::ends_with(&linux("poweroff -f"), 0)));
        add("reboot", Box::new(move |_| stories::ends_with(&linux("reboot -f").image("vmlinuz"), 4)));
        add("panic", Box::new(move |_| stories::ends_with(&linux(PANIC).image("vmlinuz"), 3)));
        add("panic-without-driver", Box::new(move |_| stories::ends_with(&without_init(version), 3)));
        let panicking = move || linux(PANIC).image("vmlinuz").cpus(2);
        add("panic-dump", Box::new(move |dir| stories::panic_is_in_the_dump(&panicking(), dir)));
        let unable = move || without_init(version);
        add("panic-dump-without-driver", Box::new(move |dir| stories::panic_is_in_the_dump(&unable(), dir)));
        let moved = move || linux("").image("vmlinuz").cpus(2);
        add("dump", Box::new(move |dir| stories::makedumpfile_reads_it(&moved(), dir)));
        add("exit-port", Box::new(move |_| stories::ends_with(&linux("vmm-exit 42").entry("linux"), 42)));
        add("typing", Box::new(move |_| stories::types_and_is_answered(&linux(""))));
        add("agent", Box::new(move |dir| stories::agent(&linux(""), dir)));
        add("sockets", Box::new(move |dir| stories::both_ways(&linux(stories::ECHO_AND_CALL), dir)));
        add(
            "socket-clones",
            Box::new(move |dir| stories::socket_clones(&linux(stories::ECHO_AND_HOLD), dir)),
        );
        add(
            "oracle-vsock",
            Box::new(move |dir| {
                let path = dir.join("v.sock").display().to_string();
                stories::capture_again(&linux("sockets echo 7").argument("--vsock", &path), dir)
            }),
        );
        for cpus in [1, 2, 4] {
            let name = format!("oracle-{cpus}");
            add(&name, Box::new(move |dir| stories::capture_again(&linux("").cpus(cpus), dir)));
        }
        add(
            "above-4g",
            Box::new(move |dir| stories::second_process(&linux("").cpus(2).memory("6G"), dir).map(drop)),
        );
        let teller = move |run: &str, cpus| linux(run).cmdline("loglevel=6").cpus(cpus);
        for cpus in [1, 2] {
            let guest = move || teller(stories::TELL_TIME, cpus);
            add(&format!("time-{cpus}"), Box::new(move |dir| stories::comes_back_later(&guest(), dir)));
            add(&format!("twins-{cpus}"), Box::new(move |dir| stories::twins(&guest(), dir)));
        }
        let by_tsc = move || teller(stories::TELL_TIME, 2).cmdline("clocksource=tsc tsc=reliable");
        add("time-tsc", Box::new(move |dir| stories::comes_back_later(&by_tsc(), dir)));
        let by_rtc = move || teller(stories::TELL_TIME_BY_RTC, 1);
        add("rtc", Box::new(move |dir| stories::asks_its_rtc(&by_rtc(), dir)));
        let by_agent = move || teller(stories::TELL_ONLY_TIME, 1);
        add("clock-by-agent", Box::new(move |dir| stories::has_an_agent(by_agent(), dir)));
        let by_itself = move || teller(stories::TELL_TIME_WITHOUT_AGENT, 1);
        add("clock-without-agent", Box::new(move |dir| stories::has_lost_its_agent(by_itself(), dir)));
        for (name, gap) in [("network", Gap::MadeUp(60)), ("network-minute", Gap::Real(60))] {
            add(name, Box::new(move |dir| stories::on_the_network(&linux(stories::SERVE), gap, dir)));
        }
        let ready = move || teller(stories::GET_READY, 1);
        add("clones", Box::new(move |dir| stories::clones(ready(), version != "6.1", dir)));
        add("network-fd", Box::new(move |dir| stories::by_descriptor(&linux(stories::SERVE), dir)));
        add("network-oracle", Box::new(move |dir| stories::network_oracle(&linux(stories::BUSY), dir)));
        add("network-taps", Box::new(move |dir| stories::no_such_tap(&linux(""), dir)));
        for (cpus, count) in [(1, 20), (1, 100), (2, 3), (2, 100)] {
            let witness = move || linux("witness").cpus(cpus).proof("witness round=");
            add(
                &format!("rounds-{count}-cpus-{cpus}"),
                Box::new(move |dir| stories::rounds(&witness(), count, dir)),
            );
        }
        add("live", Box::new(move |dir| live(version, dir)));
        let witness = move || linux("witness").cpus(2).proof("witness round=");
        add("chain", Box::new(move |dir| stories::chain(&witness(), 2, dir)));
        add("tracked-3", Box::new(move |dir| stories::tracked_chain(&witness(), 3, dir)));
        for count in [5, 50] {
            add(
                &format!("disk-commits-{count}"),
                Box::new(move |dir| stories::loses_no_commit(linux(stories::DO_WORK), count, dir)),
            );
        }
        add("oracle-every-device", Box::new(move |dir| stories::every_device(linux(stories::DO_WORK), dir)));
        let hanging = move || linux(stories::DO_WORK);
        add("disk-hangs", Box::new(move |dir| stories::outlives_a_disk_that_hangs(hanging(), dir)));
        add("small-devices", Box::new(move |dir| stories::small_devices(&linux(stories::OBEY), dir)));
        add("disk-kept", Box::new(move |dir| stories::keeps_its_disk(linux(stories::DO_WORK), dir)));
        add(
            "disk-oracle",
            Box::new(move |dir| {
                stories::capture_again(&stories::worker(linux(stories::DO_WORK).cpus(2), dir)?, dir)
            }),
        );
    }
    for (name, files) in [("switch", false), ("switch-files", true)] {
        stories.push((name.to_owned(), Box::new(move |dir| take_turns(files.then_some(dir)))));
    }
    for (name, count) in [("upgrade", 3), ("upgrade-20", 20)] {
        let around = move |dir: &Path| {
            let versions: Vec<_> = LINUX.into_iter().cycle().take(count + 1).collect();
            stories::upgraded(&versions, dir)
        };
        stories.push((name.to_owned(), Box::new(around)));
    }
    let upgrades = |dir: &Path| stories::upgraded_and_not(["6.1", "6.12", "7.2"], dir);
    stories.push(("upgrade-or-not".to_owned(), Box::new(upgrades)));
    stories.push((
        "upgrade-or-reboot".to_owned(),
        Box::new(|dir| stories::upgrade_or_reboot("6.1", "6.12", dir)),
    ));
    stories.push(("upgrade-fails".to_owned(), Box::new(|dir| stories::not_upgraded("6.1", "6.12", dir))));
    let there_and_back = ["6.1", "6.12", "7.2", "6.1"];
    stories.push(("carried".to_owned(), Box::new(move |dir| stories::carried(&there_and_back, dir))));
    stories.push(("renamed".to_owned(), Box::new(|dir| stories::renamed("6.12", "7.2", dir))));
    stories.push(("moved".to_owned(), Box::new(|dir| stories::moved("6.1", "6.12", dir))));
    stories.push(("moved-on".to_owned(), Box::new(|dir| stories::moved("6.12", "7.2", dir))));
    stories.push(("moved-back".to_owned(), Box::new(|dir| stories::moved("7.2", "6.1", dir))));
    stories.push(("not-moved".to_owned(), Box::new(|dir| stories::not_moved("6.12", "6.1", dir))));
    stories.push(("switch-cost".to_owned(), Box::new(|_| switch_cost())));
    for (version, by) in [("6.1", "7.2"), ("6.12", "6.1"), ("7.2", "6.12")] {
        let ends = Box::new(move |dir: &Path| outlives(version, by, dir));
        stories.push((format!("{version}/suspended-ends"), ends));
        stories.push((format!("{version}/vmcore-rate"), Box::new(move |_| vmcore_rate(version, by))));
        for (name, after) in [("poweroff", After::Poweroff), ("return", After::Return), ("stub", After::Stub)]
        {
            let story = Box::new(move |dir: &Path| suspended_with(version, by, after, dir));
            stories.push((format!("{version}/suspended-{name}"), story));
        }
    }
    for name in ["counter", "registers", "timer", "dirty", "smp", "entropy"] {
        stories.push((format!("bare/{name}"), Box::new(move |dir| bare(name, dir))));
    }
    for (name, most, parts) in [("power-cuts-60", 60, 1), ("power-cuts", usize::MAX, 4)] {
        stories.push((name.to_owned(), Box::new(move |dir| stories::power_cuts(most, parts, dir))));
    }
    for name in ROUNDED {
        stories.push((format!("rounds-1000/{name}"), Box::new(move |dir| thousand(name, dir))));
    }
    stories
}

/// A live snapshot of a kernel under load, beside one that stops it.
fn live(version: &str, dir: &Path) -> Result<()> {
    let guest = Guest::linux(version, "witness").cpus(2).proof("witness round=");
    let stories::Pauses { booted, restored, whole } = stories::live(&guest, dir)?;
    println!(
        "live: paused for {booted:.1} ms after a boot, {restored:.1} ms after a restore; stop-and-copy {whole:.1} ms"
    );
    Ok(())
}

/// Switches between two stock kernels, with little RAM and with much.
fn switch_cost() -> Result<()> {
    let pair = |memory, bytes| {
        let guests = [("6.1", "beat-6.1 "), ("6.12", "beat-6.12 ")].map(|(version, pulse)| {
            let run = format!("{}{pulse}{}", stories::TELL_LIFE[0], stories::TELL_LIFE[1]);
            Guest::linux(version, &run).pulse(pulse).memory(memory)
        });
        (guests, bytes)
    };
    let pairs = [pair("512M", 512 << 20), pair("4G", 4 << 30)];
    let mut rows = two_sizes(&stories::switch_cost(&pairs, 20)?)?;
    let ([guest, _], bytes) = &pairs[0];
    let back = stories::return_cost(
        guest,
        *bytes,
        &Guest::linux("6.12", "").memory("128M").pulse("ready kernel="),
        5,
    )?;
    rows.push(back.row("512M: return from an image kernel"));
    println!("{}", Report { place: "here".to_owned(), rows }.table());
    Ok(())
}

/// A guest with two vCPUs under load is written to a disk by another kernel.
fn suspended_with(version: &str, by: &'static str, after: After, dir: &Path) -> Result<()> {
    let run = format!("{}beat {}", stories::TELL_LIFE[0], stories::TELL_LIFE[1]);
    let guest = Guest::linux(version, &format!("yes > /dev/null & {run}")).pulse("beat ").cpus(2);
    stories::suspended_with(&guest, &Guest::linux(by, "").memory("128M"), after, dir)
}

/// A guest under load outlives an image kernel that ends while it writes: it panics, hangs, crashes, or is stopped.
fn outlives(version: &str, by: &'static str, dir: &Path) -> Result<()> {
    let run = format!("{}beat {}", stories::TELL_LIFE[0], stories::TELL_LIFE[1]);
    let guest = Guest::linux(version, &format!("yes > /dev/null & {run}")).pulse("beat ").cpus(2);
    let image = |then: &str| {
        let half = "dd if=/proc/vmcore of=/dev/vda bs=1M count=8 conv=fsync; echo half";
        Guest::linux(by, "").memory("128M").cmdline(&format!("before=\"{half}; {then}\""))
    };
    let ends = [
        (image(PANIC), "half", End::Its),
        // Nobody hears of this panic.
        (
            image(&format!("rmmod pvpanic_mmio; {PANIC}")).cmdline("panic=0").cpus(2),
            "end Kernel panic",
            End::Switch,
        ),
        (image("reboot -f").cmdline("reboot=t"), "half", End::Its),
        (image("sleep 1000"), "half", End::Stop),
    ];
    stories::outlives(&guest, &ends, dir)
}

/// What reading `/proc/vmcore` costs an image kernel.
fn vmcore_rate(version: &str, by: &'static str) -> Result<()> {
    let run = format!("{}beat {}", stories::TELL_LIFE[0], stories::TELL_LIFE[1]);
    let image = Guest::linux(by, "vmm-image rate").memory("128M");
    stories::vmcore_rate(&Guest::linux(version, &run).pulse("beat "), &image)
}

/// Ten switches between three stock kernels.
fn take_turns(files: Option<&Path>) -> Result<()> {
    let guests =
        [("6.1", "beat-6.1 "), ("6.12", "beat-6.12 "), ("7.2", "beat-7.2 ")].map(|(version, pulse)| {
            let run = format!("{}{pulse}{}", stories::TELL_LIFE[0], stories::TELL_LIFE[1]);
            Guest::linux(version, &run).pulse(pulse)
        });
    for turn in stories::take_turns(&guests, 10, files)? {
        println!("switch to {}: {:.1} ms, of them {:.1} ms to a file", turn.to, turn.pause_ms, turn.saved_ms);
    }
    Ok(())
}

/// A kernel that finds no init panics before any module is loaded.
fn without_init(version: &str) -> Guest {
    Guest::linux(version, "").image("vmlinuz").cmdline("rdinit=/nothing init=/nothing")
}

/// A thousand rounds, of a guest that never rests.
fn thousand(name: &str, dir: &Path) -> Result<()> {
    let guest = Guest::bare(name, dir)?;
    let guest = match name {
        "registers" => guest.cmdline("spins=30000"),
        "timer" => guest.cmdline("period=2000"),
        "dirty" => guest.cmdline("size=64 lines=20"),
        "smp" => guest.cmdline("lines=20").cpus(4),
        "entropy" => guest.switch("--rng").cmdline("rate=100"),
        _ => bail!("no plan for {name}"),
    };
    stories::rounds(&guest, 1000, dir)
}

/// Our own guests, on a KVM that runs Linux.
fn bare(name: &str, dir: &Path) -> Result<()> {
    let guest = Guest::bare(name, dir)?;
    let guest = match name {
        "smp" => guest.cpus(2),
        "entropy" => guest.switch("--rng"),
        "registers" => guest.cmdline("spins=1000000"),
        "counter" | "timer" | "dirty" => guest,
        _ => bail!("no plan for {name}"),
    };
    stories::capture_again(&guest, dir)?;
    stories::rounds(&guest, 3, dir)
}
