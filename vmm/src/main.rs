//! The command: parse, do, report.

mod operating;
mod restoring;
mod switching;

use anyhow::{Context, Result};
use clap::Parser;
use devices::virtio::{BlkState, MmioState, VsockState};
use operating::operate;
use snapshot::SealKey;
use snapshot::publish::Temporary;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use vmm::api::{BalloonRequest, Command as Verb, ForgetRequest, StopRequest};
use vmm::boot::BootSource;
use vmm::cli::{
    AgentVerb, CheckpointArgs, Cli, Command, ConsoleChoice, DumpArgs, ExecArgs, File, FlattenArgs, Remote,
    RestoreProcessArgs, Run, SnapshotArgs, UnpackArgs, VerifyArgs,
};
use vmm::config::Shape;
use vmm::disk::{Disk, DiskCare, DiskFile, DiskWish};
use vmm::restore::HostEnds;
use vmm::signals;
use vmm::virtio::{DeviceState, SlotState};
use vmm::{
    archive, ask_agent, client, complaint, doctor, exec, flatten, inspect, load, network, processes,
    saving_bar, start, vm,
};

fn main() -> ExitCode {
    share_one_heap();
    signals::let_long_writes_fail();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let done = match cli.command {
        Command::Run(args) => run(args),
        Command::Restore(args) => restoring::restore(args),
        Command::Snapshot(args) => snapshot(&args),
        Command::Dump(args) => dump(&args),
        Command::Status(vm) => ask(&vm, &Verb::Status),
        Command::Pause(vm) => ask(&vm, &Verb::Pause),
        Command::Resume(vm) => ask(&vm, &Verb::Resume),
        Command::Stop(args) => ask(&args.remote, &Verb::Stop(StopRequest { all: args.all })),
        Command::Switch(args) => switching::switch(&args),
        Command::SuspendWith(args) => switching::suspend_with(&args),
        Command::Upgrade(args) => switching::upgrade(&args),
        Command::Prepare(args) => switching::prepare(&args),
        Command::Accept(vm) => ask(&vm, &Verb::Accept),
        Command::Kernels(vm) => ask(&vm, &Verb::Kernels),
        Command::Forget(args) => ask(&args.remote, &Verb::Forget(ForgetRequest { name: args.name })),
        Command::Balloon(args) => {
            ask(&args.remote, &Verb::Balloon(BalloonRequest { target_bytes: args.target }))
        }
        Command::Exec(args) => return execute(&args),
        Command::Checkpoint(args) => checkpoint(&args),
        Command::RestoreProcess(args) => restore_process(&args),
        Command::Agent(verb) => ask_agent(&verb),
        Command::Inspect(file) => describe(&file),
        Command::Verify(file) => verify(&file),
        Command::Flatten(args) => flatten(&args),
        Command::Pack(args) => pack(&args.snapshot, &args.archive, false),
        Command::Unpack(args) => unpack(&args),
        Command::Doctor { json } => examine(json),
    };
    done.unwrap_or_else(|error| {
        complaint::say(&format!("vmm: {}", complaint::one_line(error.as_ref())));
        ExitCode::FAILURE
    })
}

/// One heap for all threads: they take little from it, and one of its own costs a thread, and each clone of a machine, more.
fn share_one_heap() {
    // SAFETY: takes two numbers; no other thread is there yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Wrong usage in one line, with status 2; help and version as clap prints them.
fn misused(error: &clap::Error) -> ExitCode {
    match complaint::usage(error) {
        Some(line) => complaint::say(&format!("vmm: {line}")),
        None => drop(error.print()),
    }
    ExitCode::from(error.exit_code() as u8)
}

fn run(args: Run) -> Result<ExitCode> {
    let kvm = vm::open()?;
    let disks = args.disks.iter().enumerate().map(|(number, wish)| wish.open(number));
    let disks = disks.collect::<Result<Vec<_>, _>>()?;
    let devices = devices(&args, &disks)?;
    let shape = Shape { name: args.name, vcpus: args.cpus, memory: args.memory, kernel: Default::default() };
    let source = BootSource {
        kernel: args.kernel.clone(),
        initrd: args.initrd,
        cmdline: args.cmdline,
        protocol: args.entry.into(),
        reserved: Vec::new(),
    };
    operate(kvm, &args.care, &args.kernel, false, |kvm, ends| {
        let ends = HostEnds { disks, ..ends };
        let machine = start::boot(kvm, shape, devices, &source, ends)?;
        if !args.force && machine.shape().kernel.version.is_some() {
            doctor::can_run_linux().map_err(anyhow::Error::msg)?;
        }
        Ok(machine)
    })
}

/// The devices that the guest finds, in the order of their windows: the disks first, then the networks.
fn devices(args: &Run, disks: &[Disk]) -> Result<Vec<SlotState>> {
    let slot = |id: &str, device| SlotState { id: id.to_owned(), device };
    let disk = |(number, (wish, disk)): (usize, (&DiskWish, &Disk))| {
        let DiskFile { size, read_only, .. } = disk.file;
        let device = BlkState { size, read_only, serial: wish.serial(number), unfinished: Vec::new() };
        slot(&disk.id, DeviceState::Blk(MmioState { registers: None, device }))
    };
    let disks = args.disks.iter().zip(disks).enumerate().map(disk);
    let rng = args.rng.then(|| slot("rng", DeviceState::Rng(MmioState::default())));
    let balloon = args.balloon.then(|| slot("balloon", DeviceState::Balloon(MmioState::default())));
    let virtio = args.console == ConsoleChoice::Virtio;
    let console = virtio.then(|| slot("console", DeviceState::Console(MmioState::default())));
    let vsock = args.vsock.as_ref().map(|wish| {
        let state = MmioState { registers: None, device: VsockState::new(wish.cid) };
        slot("vsock", DeviceState::Vsock { path: wish.path.clone(), state })
    });
    let nets = network::fresh(&args.nets)?;
    Ok(disks.chain(nets).chain([rng, balloon, console, vsock].into_iter().flatten()).collect())
}

fn ask(vm: &Remote, verb: &Verb) -> Result<ExitCode> {
    client::run(&vm.api, verb, vm.json, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn execute(args: &ExecArgs) -> ExitCode {
    let status = exec::run(args).unwrap_or_else(|error| {
        complaint::say(&format!("vmm: {}", complaint::one_line(&error)));
        error.status()
    });
    ExitCode::from(status)
}

fn checkpoint(args: &CheckpointArgs) -> Result<ExitCode> {
    processes::checkpoint(args)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the number of the first process.
fn restore_process(args: &RestoreProcessArgs) -> Result<ExitCode> {
    println!("{}", processes::restore(args)?);
    Ok(ExitCode::SUCCESS)
}

fn ask_agent(verb: &AgentVerb) -> Result<ExitCode> {
    ask_agent::run(verb, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn snapshot(args: &SnapshotArgs) -> Result<ExitCode> {
    if let Some(kernel) = &args.kernel {
        return ask(&args.remote, &client::snapshot_beside(&args.file, kernel)?);
    }
    let care = DiskCare { keep: args.with_disks, digest: args.digest_disks, at_once: args.live };
    let others = (args.parent.as_deref(), args.key.as_deref());
    let verb = |file: &Path| client::snapshot(file, args.then.map(Into::into), care, others, args.track);
    let api = &args.remote.api;
    if args.compress.is_none() {
        let (verb, mut said) = (verb(&args.file)?, Vec::new());
        saving_bar::beside(api, || client::run(api, &verb, args.remote.json, &mut said))?;
        return print(String::from_utf8_lossy(&said).trim_end());
    }
    let unpacked = Temporary::beside(&args.file)?;
    let verb = verb(unpacked.path())?;
    saving_bar::beside(api, || client::call(api, &verb))?;
    pack(unpacked.path(), &args.file, args.remote.json)
        .or_else(|error| not_packed(error, unpacked, &args.file))
}

/// There may be no VM any more that could be saved again, so the snapshot stays.
fn not_packed(error: anyhow::Error, snapshot: Temporary, archive: &Path) -> Result<ExitCode> {
    let (path, kept) = (snapshot.path().to_owned(), archive.with_added_extension("unpacked"));
    let place = snapshot.keep_as(&kept).map_or(path, |()| kept);
    Err(error.context(format!("the snapshot is whole, but not packed: it is {}", place.display())))
}

fn pack(snapshot: &Path, archive: &Path, json: bool) -> Result<ExitCode> {
    let packed = archive::pack(snapshot, archive)?;
    print(&if json { serde_json::to_string(&packed)? } else { archive::told(archive, packed) })
}

fn unpack(args: &UnpackArgs) -> Result<ExitCode> {
    let unpacked = archive::unpack(&args.archive, &args.snapshot, args.key.as_deref())?;
    print(&format!("{}: {} MiB unpacked and checked", args.snapshot.display(), unpacked.snapshot >> 20))
}

fn dump(args: &DumpArgs) -> Result<ExitCode> {
    ask(&args.remote, &client::dump(&args.file)?)
}

fn describe(args: &File) -> Result<ExitCode> {
    let description = inspect::describe(&args.file)?;
    let text = if args.json {
        serde_json::to_string_pretty(&description)?
    } else {
        inspect::table(&description).trim_fmt()
    };
    print(&text)
}

fn flatten(args: &FlattenArgs) -> Result<ExitCode> {
    let key = args.key.as_deref().map(SealKey::read).transpose()?;
    let chain = load::open_own_chain(&args.chain, key.as_ref())?;
    let bar = inspect::progress_bar("writing", chain.top().manifest().ram.bytes);
    let summary = flatten::flatten(&chain, &args.out, key.as_ref(), &mut |done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    let (count, stored) = (chain.links().len(), summary.data_bytes >> 20);
    print(&format!("{}: full, of {count} snapshots, {stored} MiB of RAM stored", args.out.display()))
}

fn verify(args: &VerifyArgs) -> Result<ExitCode> {
    let key = args.key.as_deref().map(SealKey::read).transpose()?;
    let checked = inspect::verify(&args.file, key.as_ref())?;
    print(&if args.json {
        serde_json::json!({ "intact": true, "ram_bytes": checked }).to_string()
    } else {
        format!("{}: intact, {} MiB of RAM checked", args.file.display(), checked >> 20)
    })
}

fn print(text: &str) -> Result<ExitCode> {
    writeln!(io::stdout(), "{text}").context("cannot print")?;
    Ok(ExitCode::SUCCESS)
}

fn examine(json: bool) -> Result<ExitCode> {
    doctor::run(json, &mut io::stdout()).context("cannot print")?;
    Ok(ExitCode::SUCCESS)
}
