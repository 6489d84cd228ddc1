//! Clones: many machines from one snapshot, each in a process of its own, which have in common what none of them has changed.
//!
//! In: how many, a directory. Out: processes, whose sockets are `N.api` there and whose output is in `N.console`; what memory they take.
//! Holds: this process forks before it has a thread or a VM; what it has open of the snapshot then, all of them read by offset alone. It has
//! nothing to do but to wait, and when it ends, so do they.

use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, set_parent_process_death_signal,
    wait,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read};
use std::path::{Path, PathBuf};

/// Most clones of one command.
pub const MAX: u32 = 4096;
/// What stands for a clone's number in a path.
const NUMBER: &str = "{n}";

/// Which of the processes this is.
pub enum Side {
    /// A clone. What it has is to be dropped when its guest runs.
    Clone(u32, PipeWriter),
    /// The one that all clones come from.
    Origin(Clones),
}

/// Running clones.
pub struct Clones {
    started: Vec<(u32, Pid)>,
    running: PipeReader,
    dir: PathBuf,
}

/// What memory clones take on average, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Each for itself.
    pub own: u64,
    /// With its share of what they have in common.
    pub with_share: u64,
}

/// Makes so many of this process, which must have no other thread.
///
/// # Errors
/// The host has no process or file to give; those that were made end.
pub fn fork(count: u32, dir: &Path) -> io::Result<Side> {
    fs::create_dir_all(dir)?;
    let (running, tell) = io::pipe()?;
    let mut clones = Clones { started: Vec::new(), running, dir: dir.to_owned() };
    for number in 1..=count {
        let console = File::create(console(dir, number))?;
        let origin = getpid();
        // SAFETY: there is no other thread whose locks or half-done work the new process could inherit.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => {
                // They are the origin's to end, not this one's.
                clones.started.clear();
                become_clone(origin, &console)?;
                return Ok(Side::Clone(number, tell));
            }
            id => clones.started.extend(Pid::from_raw(id).map(|id| (number, id))),
        }
    }
    Ok(Side::Origin(clones))
}

/// The control socket of a clone.
pub fn socket(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number}.api"))
}

/// A path that each clone has of its own, if it names the number's place.
pub fn numbered(path: &Path, number: u32) -> PathBuf {
    path.to_str().map_or_else(|| path.to_owned(), |text| text.replace(NUMBER, &number.to_string()).into())
}

fn console(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number}.console"))
}

fn become_clone(origin: Pid, console: &File) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    if getppid() != Some(origin) {
        return Err(io::Error::other("the process that was to make clones has ended"));
    }
    dup2_stdin(File::open("/dev/null")?)?;
    dup2_stdout(console)?;
    Ok(dup2_stderr(console)?)
}

impl Clones {
    /// Waits until every clone runs or has ended.
    pub fn wait_until_they_run(&mut self) {
        // Its end is all that there is to read, and an error is one too.
        let _ = self.running.read(&mut [0]);
    }

    /// How many there are now, and what they take; none if none is left.
    pub fn memory(&self) -> Option<(u64, Memory)> {
        let each: Vec<_> = self.started.iter().filter_map(|(_, id)| memory_of(*id)).collect();
        let count = each.len() as u64;
        let mean = |of: fn(&Memory) -> u64| each.iter().map(of).sum::<u64>().checked_div(count);
        let memory =
            Memory { own: mean(|memory| memory.own)?, with_share: mean(|memory| memory.with_share)? };
        Some((count, memory))
    }

    /// Waits until all have ended. `say` hears of each that ended badly; the first of those statuses is returned, otherwise 0.
    ///
    /// # Errors
    /// The host doesn't tell how they end.
    pub fn wait(mut self, say: impl Fn(&str)) -> io::Result<u8> {
        let mut first = 0;
        while !self.started.is_empty() {
            let Some((id, status)) = wait(WaitOptions::empty())? else { continue };
            let Some(place) = self.started.iter().position(|(_, other)| *other == id) else { continue };
            let (number, _) = self.started.swap_remove(place);
            let status = status_of(status);
            if status != 0 {
                let console = console(&self.dir, number);
                say(&format!("clone {number} ended with status {status}; see {}", console.display()));
            }
            first = if first == 0 { status } else { first };
        }
        Ok(first)
    }
}

/// Those that are left end with the value.
impl Drop for Clones {
    fn drop(&mut self) {
        for (_, id) in &self.started {
            let _ = kill_process(*id, Signal::TERM);
        }
    }
}

/// As a shell has it: 128 and the signal's number for one that was killed.
fn status_of(status: WaitStatus) -> u8 {
    let killed = status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or(killed).and_then(|status| u8::try_from(status).ok()).unwrap_or(1)
}

/// `smaps_rollup` (proc(5)) counts in KiB.
fn memory_of(process: Pid) -> Option<Memory> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.as_raw_nonzero())).ok()?;
    // One that has ended has no memory.
    Some(parse(&text)).filter(|memory| memory.with_share > 0)
}

fn parse(rollup: &str) -> Memory {
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
    };
    let field = |name| field(name).unwrap_or(0);
    Memory { own: field("Private_Clean:") + field("Private_Dirty:"), with_share: field("Pss:") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_put_where_its_place_is() {
        assert_eq!(numbered(Path::new("/run/{n}/v.sock"), 7), Path::new("/run/7/v.sock"));
        assert_eq!(numbered(Path::new("/run/v.sock"), 7), Path::new("/run/v.sock"));
    }

    #[test]
    fn memory_is_read_from_a_rollup() {
        let text = "55..-7f.. ---p 0 00:00 0 [rollup]\nRss: 900 kB\nPss:  300 kB\nPss_Dirty: 1 kB\nPrivate_Clean: 20 kB\nPrivate_Dirty: 100 kB\n";
        assert_eq!(parse(text), Memory { own: 120 << 10, with_share: 300 << 10 });
        assert_eq!(parse(""), Memory::default());
    }
}
