//! A process that is watched at every system call, and whose calls can be spoilt.
//!
//! In: a process, a directory, which of its calls to files in there is to go wrong and how. Out: what those calls did. Holds: a
//! process that is not killed runs on undisturbed once the tracer has gone.

use super::calls::{self, Done, Seen};
use super::ptrace::{self, News};
use anyhow::{Context, Result, ensure};
use libc::pid_t;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The process is killed before it.
    Killed,
    /// It does nothing, and this is its error, as in `libc`.
    Fails(i32),
    /// It does nothing, and says that it did.
    Pretends,
    /// It fails and so do all later ones of its kind.
    KeepsFailing(i32),
    /// Half of the bytes are written.
    Short,
}

/// Which call goes wrong, counted from 0, and how.
pub type Plan = Option<(usize, Fate)>;

/// Watches a process from a thread of its own, since only the thread that traces can ask.
pub struct Tracer {
    enough: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Done>>>,
}

impl Tracer {
    /// Begins to watch all threads of `pid`; returns once it does. Calls to files outside of `dir` are let alone.
    ///
    /// # Errors
    /// There is no such process, or it is not to be traced.
    pub fn attach(pid: u32, dir: &Path, plan: Plan) -> Result<Self> {
        let enough = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = channel();
        let (dir, stop, process) = (dir.to_owned(), enough.clone(), pid as pid_t);
        let thread = thread::spawn(move || {
            let mut watch = Watch::begin(process, dir, plan)?;
            let _ = ready.send(());
            watch.until(&stop)
        });
        wait_for(&is_ready, thread).map(|thread| Self { enough, thread })
    }

    /// Ends the watch. Returns the calls to files of the directory in their order.
    ///
    /// # Errors
    /// Something about the process was not as expected.
    pub fn finish(self) -> Result<Vec<Done>> {
        self.enough.store(true, Ordering::Release);
        joined(self.thread)
    }
}

fn wait_for(
    ready: &Receiver<()>,
    thread: JoinHandle<Result<Vec<Done>>>,
) -> Result<JoinHandle<Result<Vec<Done>>>> {
    if ready.recv().is_ok() {
        return Ok(thread);
    }
    joined(thread)?;
    anyhow::bail!("the tracer has ended too early")
}

fn joined(thread: JoinHandle<Result<Vec<Done>>>) -> Result<Vec<Done>> {
    thread.join().map_err(|_| anyhow::anyhow!("the tracer has panicked"))?
}

/// A call that a thread is in.
enum Inside {
    /// None of ours.
    Other,
    /// One that is noted when it is over.
    Watched(Seen),
    /// One that does nothing and returns this.
    Spoilt(i32),
    /// One that was told another length than the thread gave, to be put back.
    Shortened(Seen, u64),
}

struct Watch {
    process: pid_t,
    dir: PathBuf,
    plan: Plan,
    inside: HashMap<pid_t, Inside>,
    done: Vec<Done>,
    count: usize,
    /// The number of the call that [`Fate::KeepsFailing`] is about.
    failing: Option<(i64, i32)>,
}

impl Watch {
    fn begin(process: pid_t, dir: PathBuf, plan: Plan) -> Result<Self> {
        // A thread that is made by one that isn't traced yet is found in the next round.
        let mut seized = HashSet::new();
        loop {
            let new: Vec<_> =
                threads(process)?.into_iter().filter(|thread| !seized.contains(thread)).collect();
            if new.is_empty() {
                break;
            }
            new.iter().try_for_each(|&thread| unless_gone(ptrace::seize(thread))).context("cannot trace")?;
            seized.extend(new);
        }
        let (inside, done) = (HashMap::new(), Vec::new());
        Ok(Self { process, dir, plan, inside, done, count: 0, failing: None })
    }

    /// When this thread ends, the kernel lets go of all that it traces.
    fn until(&mut self, enough: &AtomicBool) -> Result<Vec<Done>> {
        loop {
            match ptrace::news().context("waitpid")? {
                News::None if enough.load(Ordering::Acquire) => break,
                News::Nobody => break,
                News::None => thread::sleep(Duration::from_micros(20)),
                news => self.heard(news)?,
            }
        }
        Ok(std::mem::take(&mut self.done))
    }

    fn heard(&mut self, news: News) -> Result<()> {
        let resumed = match news {
            News::Call(thread) => self.at_a_call(thread).and_then(|()| Ok(ptrace::go_on(thread, 0)?)),
            News::Signal(thread, signal) => ptrace::go_on(thread, signal).map_err(Into::into),
            News::Stop(thread) => ptrace::go_on(thread, 0).map_err(Into::into),
            News::None | News::Nobody | News::End => Ok(()),
        };
        unless_gone(resumed)
    }

    fn at_a_call(&mut self, thread: pid_t) -> Result<()> {
        match self.inside.remove(&thread) {
            None => {
                let inside = self.entered(thread)?;
                self.inside.insert(thread, inside);
                Ok(())
            }
            Some(inside) => self.left(thread, inside),
        }
    }

    fn entered(&mut self, thread: pid_t) -> Result<Inside> {
        let regs = ptrace::registers(thread)?;
        let Some(seen) = calls::of(self.process, &regs, &self.dir) else { return Ok(Inside::Other) };
        let number = self.count;
        self.count += 1;
        if let Some((_, errno)) = self.failing.filter(|(kind, _)| *kind == seen.number) {
            return skip(thread, errno);
        }
        match self.plan.filter(|(nth, _)| *nth == number) {
            Some((_, Fate::Killed)) => {
                self.kill()?;
                Ok(Inside::Other)
            }
            Some((_, Fate::Fails(errno))) => skip(thread, errno),
            Some((_, Fate::Pretends)) => skip(thread, 0),
            Some((_, Fate::KeepsFailing(errno))) => {
                self.failing = Some((seen.number, errno));
                skip(thread, errno)
            }
            Some((_, Fate::Short)) if seen.writes() => shorten(thread, seen),
            _ => Ok(Inside::Watched(seen)),
        }
    }

    fn kill(&self) -> io::Result<()> {
        // SAFETY: the process is traced, so its id is its own.
        let sent = unsafe { libc::kill(self.process, libc::SIGKILL) };
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn left(&mut self, thread: pid_t, inside: Inside) -> Result<()> {
        let mut regs = ptrace::registers(thread)?;
        match inside {
            Inside::Other => return Ok(()),
            Inside::Watched(seen) => {
                self.done.push(seen.done(self.process, regs.rax as i64)?);
                return Ok(());
            }
            Inside::Spoilt(errno) => regs.rax = -i64::from(errno) as u64,
            Inside::Shortened(seen, len) => {
                regs.rdx = len;
                self.done.push(seen.done(self.process, regs.rax as i64)?);
            }
        }
        Ok(ptrace::set_registers(thread, &regs)?)
    }
}

fn threads(process: pid_t) -> Result<Vec<pid_t>> {
    let names = fs::read_dir(format!("/proc/{process}/task"))?.map(|entry| Ok(entry?.file_name()));
    names.map(|name: io::Result<_>| Ok(name?.to_str().context("a thread's number")?.parse()?)).collect()
}

/// A thread that has ended meanwhile is no longer there to be asked.
fn unless_gone<E: Into<anyhow::Error>>(asked: Result<(), E>) -> Result<()> {
    let error = match asked.map_err(Into::into) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    if code == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

/// The call becomes one that there isn't.
fn skip(thread: pid_t, errno: i32) -> Result<Inside> {
    let mut regs = ptrace::registers(thread)?;
    regs.orig_rax = u64::MAX;
    ptrace::set_registers(thread, &regs)?;
    Ok(Inside::Spoilt(errno))
}

fn shorten(thread: pid_t, seen: Seen) -> Result<Inside> {
    let mut regs = ptrace::registers(thread)?;
    let len = regs.rdx;
    ensure!(len > 1, "a call that can't be shortened");
    regs.rdx = len / 2;
    ptrace::set_registers(thread, &regs)?;
    Ok(Inside::Shortened(seen, len))
}
