//! `workload DIR ADDRESS:PORT`, or `workload alone FILE`: a Linux program that holds on to everything that a change of kernel could lose.
//!
//! In: a directory that goes from kernel to kernel, and a peer that sends back what it gets. Out: a line for each beat, in the
//! file `beats` and over the connection; it begins with `beat`, or with `FAIL` when something is lost, and then the program
//! ends with status 1. Holds: what it looks at at each beat it has had since its start: nothing is opened again. Alone it has no
//! peer and no database, and may come to another machine.

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Instant;

const BEAT_NS: i64 = 100_000_000;
/// Bytes of the file without a name.
const GHOST: usize = 64 << 10;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["echo"] => echo(),
        ["alone", file] => alone(Path::new(file)),
        [dir, peer] => work(Path::new(dir), peer),
        _ => {
            eprintln!("usage: workload DIR ADDRESS:PORT | alone FILE");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAIL {error}");
            ExitCode::FAILURE
        }
    }
}

/// The child on the pipe.
fn echo() -> io::Result<()> {
    io::copy(&mut io::stdin().lock(), &mut io::stdout().lock()).map(drop)
}

/// A timer, a file at an offset, and a child on a pipe. There is no clock to look at: another machine has another.
fn alone(file: &Path) -> io::Result<()> {
    let (timer, mut beats) = (timer()?, File::create(file)?);
    let mut child = Pipes::to(Command::new(std::env::current_exe()?).arg("echo"))?;
    let (mut number, mut offset) = (0_u64, 0);
    loop {
        wait(&timer)?;
        let at = beats.stream_position()?;
        check(at == offset, || format!("the log's offset is {at}, and was {offset}"))?;
        number += 1;
        child.say(&number.to_string())?;
        child.expect(&number.to_string())?;
        let (pid, child) = (std::process::id(), child.child.id());
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let line = format!("beat {number} kernel={kernel} pid={pid} child={child} offset={offset}\n");
        beats.write_all(line.as_bytes())?;
        offset += line.len() as u64;
    }
}

fn work(dir: &Path, peer: &str) -> io::Result<()> {
    let mut life = Life::begin(dir, peer)?;
    loop {
        if let Err(error) = life.beat() {
            let line = format!("FAIL beat {}: {error}", life.number);
            // The story hears of it by whichever is still there.
            let _ = life.beats.write_all(format!("{line}\n").as_bytes());
            let _ = life.tcp.get_mut().write_all(format!("{line}\n").as_bytes());
            return Err(error);
        }
    }
}

/// All that is held on to.
struct Life {
    number: u64,
    pid: u32,
    last: Instant,
    timer: OwnedFd,
    beats: File,
    offset: u64,
    ghost: File,
    tmpfs: File,
    child: Pipes,
    sqlite: Pipes,
    tcp: BufReader<TcpStream>,
}

impl Life {
    fn begin(dir: &Path, peer: &str) -> io::Result<Life> {
        let mut sqlite = Pipes::to(Command::new("sqlite3").arg(dir.join("db")))?;
        sqlite.say(
            "pragma journal_mode=wal; pragma synchronous=full; create table t(n integer primary key, x);",
        )?;
        sqlite.expect("wal")?;
        Ok(Life {
            number: 0,
            pid: std::process::id(),
            last: Instant::now(),
            timer: timer()?,
            beats: File::create(dir.join("beats"))?,
            offset: 0,
            ghost: ghost(dir)?,
            tmpfs: file(Path::new("/tmp/number"))?,
            child: Pipes::to(Command::new(std::env::current_exe()?).arg("echo"))?,
            sqlite,
            tcp: BufReader::new(TcpStream::connect(peer)?),
        })
    }

    fn beat(&mut self) -> io::Result<()> {
        let expirations = wait(&self.timer)?;
        self.clock()?;
        self.files()?;
        self.number += 1;
        self.processes()?;
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let Life { number, pid, offset, .. } = self;
        let child = self.child.child.id();
        let line = format!(
            "beat {number} kernel={kernel} pid={pid} child={child} offset={offset} timer={expirations}\n"
        );
        self.beats.write_all(line.as_bytes())?;
        self.offset += line.len() as u64;
        self.tcp.get_mut().write_all(line.as_bytes())?;
        let mut back = String::new();
        self.tcp.read_line(&mut back)?;
        check(back == line, || format!("the peer sent back {back:?}"))
    }

    /// It never goes back, whatever the kernel's own clock does.
    fn clock(&mut self) -> io::Result<()> {
        let now = Instant::now();
        check(now > self.last, || format!("the clock went from {:?} to {now:?}", self.last))?;
        self.last = now;
        check(std::process::id() == self.pid, || {
            format!("process {} is now {}", self.pid, std::process::id())
        })
    }

    /// The last beat's number is in all of them.
    fn files(&mut self) -> io::Result<()> {
        let at = self.beats.stream_position()?;
        check(at == self.offset, || format!("the log's offset is {at}, and was {}", self.offset))?;
        let len = self.beats.metadata()?.len();
        check(len == self.offset, || format!("the log has {len} bytes, and had {}", self.offset))?;
        let mut contents = vec![0; GHOST];
        self.ghost.read_exact_at(&mut contents, 0)?;
        check(contents == pattern(self.number), || "the file without a name has other contents".to_owned())?;
        self.ghost.write_all_at(&pattern(self.number + 1), 0)?;
        let mut number = String::new();
        self.tmpfs.seek(SeekFrom::Start(0))?;
        self.tmpfs.read_to_string(&mut number)?;
        check(number == self.number.to_string(), || format!("the tmpfs has {number:?}"))?;
        self.tmpfs.write_all_at((self.number + 1).to_string().as_bytes(), 0)
    }

    fn processes(&mut self) -> io::Result<()> {
        let number = self.number;
        self.child.say(&number.to_string())?;
        self.child.expect(&number.to_string())?;
        self.sqlite.say(&format!(
            "insert into t values({number}, randomblob(500)); select count(*), max(n) from t;"
        ))?;
        self.sqlite.expect(&format!("{number}|{number}"))
    }
}

/// A child that answers line by line.
struct Pipes {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Pipes {
    fn to(command: &mut Command) -> io::Result<Pipes> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let gone = || io::Error::other("a child without pipes");
        let input = child.stdin.take().ok_or_else(gone)?;
        let output = BufReader::new(child.stdout.take().ok_or_else(gone)?);
        Ok(Pipes { child, input, output })
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.input, "{line}")
    }

    fn expect(&mut self, line: &str) -> io::Result<()> {
        let mut said = String::new();
        self.output.read_line(&mut said)?;
        check(said.trim_end() == line, || format!("a child says {said:?} and not {line:?}"))
    }
}

fn timer() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let beat = Timespec { tv_sec: 0, tv_nsec: BEAT_NS };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: beat, it_value: beat })?;
    Ok(timer)
}

/// How often the timer went off since the last call.
fn wait(timer: &OwnedFd) -> io::Result<u64> {
    let mut count = [0; 8];
    rustix::io::retry_on_intr(|| rustix::io::read(timer, &mut count))?;
    Ok(u64::from_ne_bytes(count))
}

/// An open file that has no name any more.
fn ghost(dir: &Path) -> io::Result<File> {
    let path = dir.join("ghost");
    let file = file(&path)?;
    file.write_all_at(&pattern(0), 0)?;
    fs::remove_file(path)?;
    Ok(file)
}

fn pattern(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(GHOST / 8)
}

/// A file that says `0`.
fn file(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.write_all_at(b"0", 0)?;
    Ok(file)
}

fn check(holds: bool, otherwise: impl FnOnce() -> String) -> io::Result<()> {
    if holds { Ok(()) } else { Err(io::Error::other(otherwise())) }
}
