//! What can be asked for.
//!
//! In: words. Out: what they ask for, done. Holds: `resume` may follow whatever happened, any number of times.

use crate::criu::Then;
use crate::network::{self, Network};
use crate::place::{self, Record};
use crate::steps::Steps;
use crate::{carry, check, container, criu, disk, group, hold, init};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::path::PathBuf;

/// One call of the program.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Attach(Attach),
    Start { name: String, command: Vec<OsString> },
    Contain { name: String, command: Vec<OsString> },
    Init { name: String, command: Vec<OsString> },
    StartEmpty,
    Sleep,
    Check,
    PreDump,
    Dump,
    Restore { hold: bool },
    Resume { keep: bool },
    State,
    Export { pid: i32, then: Then },
    Import,
    Continue { pid: i32 },
    End { pid: i32 },
}

impl Request {
    /// What the words ask for, or nothing if they mean nothing.
    pub(crate) fn parse(words: &[String]) -> Option<Request> {
        let (verb, rest) = words.split_first()?;
        let words: Vec<&str> = rest.iter().map(String::as_str).collect();
        match (verb.as_str(), &words[..]) {
            ("attach", options) => Attach::parse(options).map(Self::Attach),
            ("start", words) => named(words).map(|(name, command)| Self::Start { name, command }),
            // The next two are steps of `start` and for nobody else.
            ("contain", words) => named(words).map(|(name, command)| Self::Contain { name, command }),
            ("init", words) => named(words).map(|(name, command)| Self::Init { name, command }),
            // And these of `check`.
            ("start-empty", []) => Some(Self::StartEmpty),
            ("sleep", []) => Some(Self::Sleep),
            ("check", []) => Some(Self::Check),
            ("pre-dump", []) => Some(Self::PreDump),
            ("dump", []) => Some(Self::Dump),
            ("restore", []) => Some(Self::Restore { hold: false }),
            ("restore", ["--hold"]) => Some(Self::Restore { hold: true }),
            ("resume", []) => Some(Self::Resume { keep: false }),
            ("resume", ["--keep"]) => Some(Self::Resume { keep: true }),
            ("state", []) => Some(Self::State),
            ("export", [pid]) => positive(pid).map(|pid| Self::Export { pid, then: Then::Run }),
            ("export", ["--stop", pid]) => positive(pid).map(|pid| Self::Export { pid, then: Then::Stop }),
            ("import", []) => Some(Self::Import),
            ("continue", [pid]) => positive(pid).map(|pid| Self::Continue { pid }),
            ("end", [pid]) => positive(pid).map(|pid| Self::End { pid }),
            _ => None,
        }
    }

    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Attach(wanted) => attach(&wanted),
            Self::Start { name, command } => start(&name, &command),
            Self::Contain { name, command } => container::contain(&name, &command),
            Self::Init { name, command } => init::run(&name, &command),
            Self::StartEmpty => container::start_empty().map(|pid| println!("{pid}")),
            Self::Sleep => container::sleep(),
            Self::Check => check::check(),
            Self::PreDump => pre_dump(),
            Self::Dump => dump(),
            Self::Restore { hold } => restore(hold),
            Self::Resume { keep } => resume(keep),
            Self::State => state(),
            Self::Export { pid, then } => carry::export(pid, then),
            Self::Import => carry::import().map(|pid| println!("pid={pid}")),
            Self::Continue { pid } => carry::go_on(pid),
            Self::End { pid } => carry::end(pid),
        }
    }
}

fn positive(word: &str) -> Option<i32> {
    word.parse().ok().filter(|&number| number > 0)
}

/// `[--name NAME] -- COMMAND…`
fn named(words: &[&str]) -> Option<(String, Vec<OsString>)> {
    let (name, words) = match words {
        ["--name", name, rest @ ..] => (*name, rest),
        rest => ("workload", rest),
    };
    let ["--", command @ ..] = words else { return None };
    let plain = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '=', '\n']);
    (plain(name) && !command.is_empty())
        .then(|| (name.to_owned(), command.iter().map(OsString::from).collect()))
}

/// What `attach` is told; nothing, if it was recorded by an earlier kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attach {
    network: Option<Network>,
    persist: Option<PathBuf>,
}

impl Attach {
    fn parse(words: &[&str]) -> Option<Attach> {
        let pairs = words.chunks_exact(2);
        pairs.remainder().is_empty().then_some(())?;
        let (mut address, mut gateway, mut persist) = (None, None, None);
        for pair in pairs {
            let place = match pair[0] {
                "--address" => &mut address,
                "--gateway" => &mut gateway,
                "--persist" => &mut persist,
                _ => return None,
            };
            *place = Some(pair[1].to_owned());
        }
        // A gateway is of no use without an address.
        (address.is_some() || gateway.is_none()).then_some(())?;
        let network = match address {
            Some(address) => Some(Network::parse(&address, gateway.as_deref())?),
            None => None,
        };
        Some(Attach { network, persist: persist.map(PathBuf::from) })
    }
}

/// The network is held before there is one: a kernel that knows nothing of a connection would reset it.
fn attach(wanted: &Attach) -> Result<()> {
    let mut steps = Steps::new();
    criu::get_ready()?;
    steps.did("ready");
    hold::hold()?;
    steps.did("hold");
    disk::attach(wanted.persist.as_deref())?;
    steps.did("mount");
    if let Some(network) = &wanted.network {
        network.record()?;
    }
    network::attach()?;
    steps.did("address");
    println!("{steps}");
    Ok(())
}

/// The other end of `attach` and of `dump`.
fn release() -> Result<()> {
    hold::release()?;
    network::up()
}

fn start(name: &str, command: &[OsString]) -> Result<()> {
    disk::must_be_mounted()?;
    if let Some(record) = Record::read()? {
        ensure!(!record.runs(), "`{}` runs already, as process {}", record.name, record.pid);
    }
    place::forget_images()?;
    // First: what makes namespaces for its child can start no other program any more.
    release()?;
    let pid = container::start(name, command)?;
    Record { name: name.to_owned(), pid }.write()?;
    println!("name={name} pid={pid}");
    Ok(())
}

fn pre_dump() -> Result<()> {
    let mut steps = Steps::new();
    let images = criu::pre_dump(running()?.pid)?;
    steps.did("criu");
    println!("{steps} bytes={}", images.bytes()?);
    Ok(())
}

fn dump() -> Result<()> {
    let record = running()?;
    criu::get_ready()?;
    let mut steps = Steps::new();
    match dump_it(&record, &mut steps) {
        Ok(bytes) => {
            println!("{steps} bytes={bytes}");
            Ok(())
        }
        Err(error) => {
            resume(false).context("after a dump that failed, too")?;
            Err(error)
        }
    }
}

/// Returns what was written.
fn dump_it(record: &Record, steps: &mut Steps) -> Result<u64> {
    hold::hold()?;
    steps.did("hold");
    group::workload().freeze()?;
    steps.did("freeze");
    let images = criu::dump(record.pid)?;
    steps.did("criu");
    disk::freeze()?;
    steps.did("sync");
    images.bytes()
}

fn restore(keep_hold: bool) -> Result<()> {
    let mut steps = Steps::new();
    disk::must_be_mounted()?;
    let mut record = Record::read()?.context("there is no workload on /persist")?;
    criu::get_ready()?;
    hold::hold()?;
    steps.did("ready");
    record.pid = criu::restore()?;
    record.write()?;
    steps.did("criu");
    if keep_hold {
        // What is sent while the network is held is sent again a second later at the earliest.
        group::workload().freeze()?;
        steps.did("freeze");
    } else {
        resume(false)?;
    }
    println!("{steps} pid={}", record.pid);
    Ok(())
}

/// Whatever was stopped goes on, and is heard before anything is tidied up.
fn resume(keep: bool) -> Result<()> {
    disk::thaw()?;
    release()?;
    group::workload().thaw()?;
    if keep { Ok(()) } else { place::forget_images() }
}

fn state() -> Result<()> {
    let Some(record) = Record::read()? else {
        println!("state=none");
        return Ok(());
    };
    let state = match (record.runs(), group::workload().is_frozen()) {
        (false, _) => "ended",
        (true, true) => "frozen",
        (true, false) => "running",
    };
    println!("state={state} name={} pid={}", record.name, record.pid);
    Ok(())
}

fn running() -> Result<Record> {
    disk::must_be_mounted()?;
    let record = Record::read()?.context("there is no workload on /persist")?;
    if !record.runs() {
        bail!("`{}` does not run here", record.name);
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<Request> {
        Request::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_command_comes_after_two_dashes_whatever_it_is_called() {
        let start = |name: &str, words: &[&str]| {
            let command = words.iter().map(OsString::from).collect();
            Some(Request::Start { name: name.to_owned(), command })
        };
        assert_eq!(parse("start -- sleep 1"), start("workload", &["sleep", "1"]));
        assert_eq!(parse("start --name web -- --name x"), start("web", &["--name", "x"]));
        assert_eq!(parse("start sleep 1"), None);
        assert_eq!(parse("start --"), None);
        assert_eq!(parse("start --name ../x -- sleep"), None);
    }

    #[test]
    fn what_attach_is_told_comes_in_pairs() {
        let Some(Request::Attach(told)) = parse("attach --address 10.0.0.2/24 --persist /dev/vdb") else {
            panic!()
        };
        assert_eq!(told.network, Network::parse("10.0.0.2/24", None));
        assert_eq!(told.persist, Some("/dev/vdb".into()));
        assert_eq!(parse("attach"), Some(Request::Attach(Attach::default())));
        assert_eq!(parse("attach --address"), None);
        assert_eq!(parse("attach --gateway 10.0.0.1"), None);
        assert_eq!(parse("attach --address here"), None);
    }

    #[test]
    fn a_verb_takes_what_it_knows_and_no_more() {
        assert_eq!(parse("restore --hold"), Some(Request::Restore { hold: true }));
        assert_eq!(parse("restore --held"), None);
        assert_eq!(parse("resume --keep"), Some(Request::Resume { keep: true }));
        assert_eq!(parse("dump now"), None);
        assert_eq!(parse("undump"), None);
    }
}
