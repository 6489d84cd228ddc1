//! `vmm restore`.
//!
//! In: its arguments. Out: a machine that goes on in this process, or many of them in processes of their own. Holds: nothing runs before
//! all that is to be refused has been.

use crate::misused;
use crate::operating::operate;
use anyhow::{Context, Result};
use kvm_ioctls::Kvm;
use snapshot::{Chain, SealKey, Snapshot};
use std::io::PipeWriter;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use vmm::cli::{Restore, TimeChoice, TimingChoice, VerifyChoice};
use vmm::clones::{self, Clones, Memory, Side};
use vmm::machine::Machine;
use vmm::overrides::Overrides;
use vmm::ram::GuestRam;
use vmm::restore::HostEnds;
use vmm::stub::Report;
use vmm::timing::Begun;
use vmm::{background_check, complaint, inspect, load, start, timing, vm, wall_clock, working_set};

/// How long guests that have begun to run are given to have the memory that they work with, before it is told how much that is.
const A_WHILE: Duration = Duration::from_millis(500);

/// One machine or many.
pub(crate) fn restore(args: Restore) -> Result<ExitCode> {
    if let Err(error) = args.check() {
        return Ok(misused(&error));
    }
    let (Some(count), Some(dir)) = (args.clones, args.api_dir.clone()) else { return one(&args, None, None) };
    // All run from what is checked once, whatever has its name by then; of the stub's way each checks all.
    let chain = (!args.via_stub).then(|| checked(&args)).transpose()?;
    match clones::fork(count, &dir).with_context(|| format!("cannot start clones in {}", dir.display()))? {
        Side::Clone(number, running) => one(&numbered(args, &dir, number), chain, Some(running)),
        Side::Origin(clones) => {
            if let Some(chain) = chain
                && args.verify == VerifyChoice::Lazy
            {
                check_for_all(chain)?;
            }
            look_after(clones)
        }
    }
}

/// One check serves all clones, which end with this process.
fn check_for_all(chain: Chain) -> Result<()> {
    let end = |why: String| {
        complaint::say(&format!("vmm: the clones cannot go on: {why}"));
        std::process::exit(1);
    };
    background_check::start(chain, end).context("cannot start a thread that checks RAM")
}

/// What the clone of that number is started with.
fn numbered(mut args: Restore, dir: &Path, number: u32) -> Restore {
    args.care.socket = Some(clones::socket(dir, number));
    args.verify = VerifyChoice::None;
    args.vsock = args.vsock.map(|path| clones::numbered(&path, number));
    args
}

fn look_after(mut clones: Clones) -> Result<ExitCode> {
    clones.wait_until_they_run();
    std::thread::sleep(A_WHILE);
    if let Some((count, Memory { own, with_share })) = clones.memory() {
        let [own, with_share] = [own, with_share].map(|bytes| bytes as f64 / f64::from(1 << 20));
        complaint::say(&format!(
            "vmm: {count} clones; each has {own:.2} MiB of its own, {with_share:.2} MiB with its share of what they have in common"
        ));
    }
    let say = |text: &str| complaint::say(&format!("vmm: {}", complaint::printable(text)));
    Ok(ExitCode::from(clones.wait(say).context("cannot wait for the clones")?))
}

/// The machine, in this process, of a chain that may be open already. `running` is dropped when its guest runs, or stands ready to.
fn one(args: &Restore, opened: Option<Chain>, running: Option<PipeWriter>) -> Result<ExitCode> {
    let begun =
        args.timing.map(|_| Begun::now()).transpose().context("cannot tell when this process began")?;
    let kvm = vm::open()?;
    // KVM looks at each mapping of the process to make one, and RAM may be many.
    let empty = vm::empty(&kvm)?;
    let (chain, ram, report) = open(&kvm, args, opened)?;
    let snapshot = chain.top();
    if args.prefetch {
        working_set::prefetch(snapshot, &ram)?;
    }
    if args.record_working_set {
        ram.read_singly();
    }
    if let Some(expected) = &args.expect_kernel {
        load::expect_kernel(snapshot, expected)?;
    }
    let overrides = Overrides { vsock: args.vsock.clone(), nets: args.nets.clone() };
    let disks = load::open_disks(snapshot, &args.disks, args.allow_changed_disks)?;
    if let Some(report) = report {
        complaint::say(&complaint::printable(&report.line));
    }
    operate(kvm, &args.care, &args.file, args.paused, |kvm, ends| {
        let ends = HostEnds { disks, ..ends };
        let mut machine = start::restore((kvm, empty), chain.top(), ram, overrides, args.time.into(), ends)?;
        if let Some((begun, choice)) = begun.zip(args.timing) {
            tell_timing(&mut machine, begun, choice);
        }
        if args.record_working_set {
            record_working_set(&mut machine, chain.top());
        }
        if args.time == TimeChoice::Step {
            let vsock = machine.board().vsock_path().map(Into::into);
            machine.when_run(|| wall_clock::step(vsock));
        }
        // Who reads all of the file spoils the list of what the guest reads.
        if args.verify == VerifyChoice::Lazy && !args.via_stub && !args.record_working_set {
            check_meanwhile(&mut machine, chain);
        }
        if !args.paused {
            machine.when_run(|| drop(running));
        }
        Ok(machine)
    })
}

/// The check begins when the guest runs, and ends it if need be.
fn check_meanwhile(machine: &mut Machine, chain: Chain) {
    let alarm = machine.alarm();
    machine.when_run(move || {
        if let Err(error) = background_check::start(chain, move |why| alarm.ring(why)) {
            complaint::say(&format!("vmm: the guest's RAM is not checked: cannot start a thread: {error}"));
        }
    });
}

/// Once the guest runs it is watched until it needs no new memory.
fn tell_timing(machine: &mut Machine, begun: Begun, choice: TimingChoice) {
    let first = machine.first_run();
    let watch = move || {
        if let Some(timing) = timing::watch(begun, &first) {
            let line = if choice == TimingChoice::Json { timing.json() } else { timing.line() };
            complaint::say(&line);
        }
    };
    machine.when_run(|| beside("timing", watch));
}

/// Once the guest needs no new memory, what it has used is written down.
fn record_working_set(machine: &mut Machine, snapshot: &Snapshot) {
    let (first, ram) = (machine.first_run(), machine.ram().clone());
    let (path, generation) = (snapshot.path().to_owned(), snapshot.manifest().about.generation.to_string());
    let record = move || match working_set::record(&path, &generation, &ram, &first) {
        Ok(Some((path, bytes))) => complaint::say(&complaint::printable(&format!(
            "vmm: {}: {} KiB of working set",
            path.display(),
            bytes >> 10
        ))),
        Ok(None) => {}
        Err(error) => complaint::say(&format!("vmm: {}", complaint::one_line(&error))),
    };
    machine.when_run(|| beside("record", record));
}

/// Does something in a thread of its own. Without one it is not done.
fn beside(name: &str, act: impl FnOnce() + Send + 'static) {
    drop(std::thread::Builder::new().name(name.to_owned()).spawn(act));
}

/// A snapshot with all that it needs, each of them one's own if there is a key to tell, and its RAM checked if that is to be done first.
fn checked(args: &Restore) -> Result<Chain> {
    let key = args.key.as_deref().map(SealKey::read).transpose()?;
    let chain = load::open_own_chain(&args.file, key.as_ref())?;
    if args.verify == VerifyChoice::Full {
        inspect::verify_ram(&chain)?;
    }
    Ok(chain)
}

/// A snapshot and its RAM, mapped from the file, or put in place by the stub, which reports.
fn open(kvm: &Kvm, args: &Restore, opened: Option<Chain>) -> Result<(Chain, GuestRam, Option<Report>)> {
    if args.via_stub {
        let (snapshot, ram, report) = load::via_stub(kvm, &args.file)?;
        return Ok((snapshot.into(), ram, Some(report)));
    }
    let chain = opened.map_or_else(|| checked(args), Ok)?;
    let ram = load::ram_of(&chain)?;
    Ok((chain, ram, None))
}
