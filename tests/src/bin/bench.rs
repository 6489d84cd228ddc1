//! `bench`: what a restore costs beside what KVM costs, on this machine's `/dev/kvm` and in the lab.
//!
//! In: `here`, or of that only `restores`, `saves` or `live`; `lab`, `qemu`, or nothing for all, and then what has a goal
//! in one table more. Out: a table for each, and the same in `target/bench/` as JSON and as a picture. Holds: a figure and its floor are measured by
//! turns in one run.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmm_tests::bench::{
    Report, Row, Subject, clones, cold, in_the_lab, incremental, inside, live, qemu_inside, restores,
    two_sizes, whole,
};
use vmm_tests::guests::Guest;
use vmm_tests::stories;
use vmm_tests::vm::{LIMIT, TestVm};

const ROUNDS: usize = 20;
/// Single turns have ratios a third apart (their quartiles, on a machine that is shared), so a median of 60 differs by a tenth and more from
/// one run to the next; one of so many by half of that.
const RESTORES: usize = 240;
const LAB_ROUNDS: usize = 10;
const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench");
/// Sizes as the command line has them, and in bytes.
const SIZES: [(&str, u64); 2] = [("256M", 256 << 20), ("8G", 8 << 30)];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => all(),
        ["restores"] => show(&part("restoring", restored)?, "restores"),
        ["saves"] => show(&part("saving", saved)?, "saves"),
        ["live"] => show(&part("live", live)?, "live"),
        ["here"] => show(&here()?, "here").and_then(|()| stub()),
        ["lab"] => show(&lab()?, "lab"),
        ["qemu"] => show(&qemu()?, "qemu"),
        ["inside", "qemu"] => qemu_inside(),
        ["inside", rounds] => inside(rounds.parse().context("a number of rounds")?),
        other => bail!(
            "{other:?}: expected `here`, `restores`, `saves`, `live`, `lab`, `qemu`, or nothing for all"
        ),
    }
}

fn all() -> Result<()> {
    let here = here()?;
    show(&here, "here")?;
    stub()?;
    let lab = lab()?;
    show(&lab, "lab")?;
    let qemu = qemu()?;
    show(&qemu, "qemu")?;
    show(&Report::goals("all goals", &[here, lab, qemu]), "goals")
}

fn show(report: &Report, name: &str) -> Result<()> {
    println!("{}\n", report.table());
    report.write(Path::new(DIR), name)
}

fn lab() -> Result<Report> {
    in_the_lab(&LAB_ROUNDS.to_string())
}

/// Another lab, which has little else to do.
fn qemu() -> Result<Report> {
    in_the_lab("qemu")
}

fn stub() -> Result<()> {
    let dir = tempfile::tempdir()?;
    println!("The restore stub beside the host's memcpy, medians:\n");
    stories::stub_rate(&Guest::bare("dirty", dir.path())?.cmdline("size=96"), dir.path())
}

/// On this machine, with our own guests.
fn here() -> Result<Report> {
    // Beside the build, which is on a disk; a directory for temporary files may be in memory.
    std::fs::create_dir_all(DIR)?;
    let dir = tempfile::tempdir_in(DIR).context("no directory for the snapshots")?;
    let mut rows = restored(dir.path())?;
    rows.extend(clones("256M", &dir.path().join("256M"))?);
    rows.extend(cold(dir.path())?);
    rows.extend(saved(dir.path())?);
    rows.extend(first_lines(dir.path())?);
    rows.extend(switches(dir.path())?);
    Ok(Report { place: "this machine".to_owned(), rows })
}

/// Of all that, what is about one thing.
fn part(what: &str, rows: fn(&Path) -> Result<Vec<Row>>) -> Result<Report> {
    std::fs::create_dir_all(DIR)?;
    let dir = tempfile::tempdir_in(DIR).context("no directory for the snapshots")?;
    Ok(Report { place: format!("this machine, {what}"), rows: rows(dir.path())? })
}

fn restored(dir: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (memory, _) in SIZES {
        let file = dir.join(memory);
        save(&Guest::bare("port", dir)?.memory(memory), &file)?;
        let subject = Subject { name: memory.to_owned(), file, exits_at_once: true };
        rows.extend(restores(&subject, RESTORES)?);
    }
    rows.push(alike(&rows)?);
    Ok(rows)
}

fn saved(dir: &Path) -> Result<Vec<Row>> {
    Ok([whole(dir)?, incremental(dir)?, live(dir)?].concat())
}

/// How much dearer the restore of the largest machine is than that of the smallest, each as a multiple of its floor.
fn alike(rows: &[Row]) -> Result<Row> {
    let calls = rows.iter().filter(|row| row.what.contains("call to first instruction"));
    let ratios: Vec<_> = calls.filter_map(Row::ratio).collect();
    let [small, large] = ratios[..] else { anyhow::bail!("{} sizes", ratios.len()) };
    Ok(Row::new("ratio at 8G ÷ ratio at 256M", "", vec![large / small]).goal(1.1))
}

/// From the start of a process to the guest's first line: a boot beside a restore.
fn first_lines(dir: &Path) -> Result<Vec<Row>> {
    // 1000 lines a second: no restore waits long for the guest's next one.
    let guest = Guest::bare("counter", dir)?.memory("256M").cmdline("rate=1000");
    let file = dir.join("counter.snapshot");
    save(&guest, &file)?;
    let (mut boots, mut restores) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        boots.push(first_line(&guest.run_args())?);
        restores.push(first_line(&["restore".to_owned(), file.display().to_string()])?);
    }
    Ok(vec![
        Row::new("256M: boot, spawn to first line", "ms", boots),
        Row::new("256M: restore, spawn to first line", "ms", restores),
    ])
}

fn switches(dir: &Path) -> Result<Vec<Row>> {
    let (counter, timer) = (Guest::bare("counter", dir)?.cmdline("rate=1000"), Guest::bare("timer", dir)?);
    let pair = |memory, bytes| ([counter.clone().memory(memory), timer.clone().memory(memory)], bytes);
    let pairs = [pair("512M", 512 << 20), pair("4G", 4 << 30)];
    let mut rows = two_sizes(&stories::switch_cost(&pairs, ROUNDS)?)?;
    let ([guest, image], bytes) = &pairs[0];
    let back = stories::return_cost(guest, *bytes, &image.clone().memory("128M"), ROUNDS)?;
    rows.push(back.row("512M: return from an image kernel"));
    Ok(rows)
}

fn save(guest: &Guest, file: &Path) -> Result<()> {
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(file).map(drop)
}

fn first_line(args: &[String]) -> Result<f64> {
    let began = Instant::now();
    TestVm::start(args)?.next_line(began + LIMIT)?;
    Ok(Duration::as_secs_f64(&began.elapsed()) * 1e3)
}
