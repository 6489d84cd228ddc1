//! A `vmm` process under test, and what a user would do with it.
//!
//! In: arguments, as a user types them. Out: the lines that it prints, its exit status. Holds: a process never outlives
//! its [`TestVm`], and every wait has a limit and fails with the output so far.

use crate::autopsy;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

/// The longest that anything may take: Linux boots in tens of seconds in a busy lab.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Where the `vmm` under test is: beside this program, or in a lab on PATH.
pub fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| {
        let dir = exe.parent()?;
        let dir = if dir.ends_with("deps") { dir.parent()? } else { dir };
        Some(dir.join("vmm")).filter(|path| path.exists())
    });
    beside.unwrap_or_else(|| "vmm".into())
}

/// Runs `vmm` to its end and returns what it printed.
///
/// # Errors
/// It can't be started.
pub fn vmm<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Output> {
    Command::new(program()).args(args).stdin(Stdio::null()).output().context("cannot run vmm")
}

/// A path as it is typed.
///
/// # Errors
/// It is not UTF-8.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().context("path")
}

/// Runs `vmm`, which has to do it, and returns what it says.
///
/// # Errors
/// It does not.
pub fn done(args: &[&str]) -> Result<String> {
    let output = vmm(args.iter().copied())?;
    ensure!(output.status.success(), "vmm {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a process ends within a time.
///
/// # Errors
/// It is none of ours any more.
pub fn ends_within(child: &mut Child, time: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + time;
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(child.try_wait()?.is_some())
}

/// Asks again and again until there is something.
///
/// # Errors
/// [`LIMIT`] passes, or asking fails.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("the time is up while waiting for {what}")
}

/// When a line was read from the process, whenever somebody wants it: by the clock that goes on, and by the one that is set.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// By which time is measured.
    pub at: Instant,
    /// What the host's wall clock said.
    pub wall: SystemTime,
}

impl Arrival {
    fn now() -> Self {
        Self { at: Instant::now(), wall: SystemTime::now() }
    }
}

/// A running `vmm run` or `vmm restore`.
pub struct TestVm {
    child: Child,
    lines: Receiver<(String, Arrival)>,
    seen: Vec<String>,
    last: Arrival,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl TestVm {
    /// Starts `vmm` with these arguments and a control socket.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(args: &[String]) -> Result<Self> {
        let mut command = Command::new(program());
        command.args(args);
        Self::start_as(command)
    }

    /// Starts this command, which becomes a `vmm run` or a `vmm restore`, with a control socket.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_as(mut command: Command) -> Result<Self> {
        let dir = tempfile::tempdir().context("no directory for the control socket")?;
        let socket = dir.path().join("api");
        command.arg("--api").arg(&socket);
        Self::spawn(command, dir, socket)
    }

    /// Starts a monitor that has no control socket: not `vmm`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_other(command: Command) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("none");
        Self::spawn(command, dir, socket)
    }

    fn spawn(mut command: Command, dir: tempfile::TempDir, socket: PathBuf) -> Result<Self> {
        let (output, writer) = std::io::pipe()?;
        // SAFETY: prctl is a system call like any other, and safe between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        let child = command
            .stdin(Stdio::piped())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let last = Arrival::now();
        Ok(Self { child, lines: lines_of(output), seen: Vec::new(), last, socket, _dir: dir })
    }

    /// Restores a snapshot.
    ///
    /// # Errors
    /// `vmm` can't be started.
    pub fn restore(file: &Path) -> Result<Self> {
        Self::start(&["restore".to_owned(), file.display().to_string()])
    }

    /// Restores a snapshot, with these arguments as well.
    ///
    /// # Errors
    /// `vmm` can't be started.
    pub fn restore_with(file: &Path, arguments: &[&str]) -> Result<Self> {
        let mut args = vec!["restore".to_owned(), file.display().to_string()];
        args.extend(arguments.iter().map(|&argument| argument.to_owned()));
        Self::start(&args)
    }

    /// Restores a snapshot and leaves it paused.
    ///
    /// # Errors
    /// `vmm` can't be started.
    pub fn restore_paused(file: &Path) -> Result<Self> {
        Self::start(&["restore".to_owned(), "--paused".to_owned(), file.display().to_string()])
    }

    /// Waits for a line with `text` in it and returns that line.
    ///
    /// # Errors
    /// The process ends first, or says `FAIL`, or [`LIMIT`] passes.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let line = self.next_line(deadline).map_err(|error| self.with_autopsy(error));
            let line = line.with_context(|| format!("while waiting for \"{text}\""))?;
            ensure!(!line.contains("FAIL"), "the guest says: {line}");
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// The next line, whatever it is.
    ///
    /// # Errors
    /// The process ends first, or the deadline passes.
    pub fn next_line(&mut self, deadline: Instant) -> Result<String> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((line, arrival)) => {
                self.seen.push(line.clone());
                self.last = arrival;
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => bail!("the time is up; the last lines were:\n{}", self.tail()),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("vmm has ended; its last lines were:\n{}", self.tail())
            }
        }
    }

    /// One that has not ended is somewhere.
    fn with_autopsy(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self.child.try_wait() {
            Ok(None) => anyhow!("{error:#}\n{}", autopsy::of(&self.socket)),
            _ => error,
        }
    }

    /// Lines that come within a time.
    pub fn lines_within(&mut self, time: Duration) -> Vec<String> {
        let deadline = Instant::now() + time;
        std::iter::from_fn(|| self.next_line(deadline).ok()).collect()
    }

    /// Types a line on the guest's console.
    ///
    /// # Errors
    /// The process has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("standard input is closed")?;
        writeln!(stdin, "{line}").context("cannot type to the guest")
    }

    /// Ends standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    /// A control verb, with `--json`.
    ///
    /// # Errors
    /// The verb fails; the error is what it said.
    pub fn ask(&self, verb: &str, args: &[&str]) -> Result<serde_json::Value> {
        self.wait_for_socket()?;
        let socket = self.socket.to_str().context("socket path")?;
        let output = vmm([&[verb, "--json", "--api", socket], args].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!said.contains("the VM is ending"), "{verb}: {said}{}", self.last_words());
        ensure!(output.status.success(), "{verb}: {said}");
        serde_json::from_slice(&output.stdout).with_context(|| format!("{verb} printed no JSON"))
    }

    /// Why a VM ends that says so; one that does not end says no more than a second's lines.
    fn last_words(&self) -> String {
        let deadline = Instant::now() + Duration::from_secs(1);
        let next = || {
            let left = deadline.saturating_duration_since(Instant::now());
            self.lines.recv_timeout(left).ok().map(|(line, _)| line)
        };
        [self.tail()].into_iter().chain(std::iter::from_fn(next)).collect::<Vec<_>>().join("\n")
    }

    /// Saves the VM; `then` as the command takes it.
    ///
    /// # Errors
    /// The verb fails.
    pub fn snapshot(&self, file: &Path, then: &str) -> Result<serde_json::Value> {
        self.snapshot_with(file, then, &[])
    }

    /// Saves the VM, with these arguments as well.
    ///
    /// # Errors
    /// The verb fails.
    pub fn snapshot_with(&self, file: &Path, then: &str, arguments: &[&str]) -> Result<serde_json::Value> {
        let file = file.to_str().context("path")?;
        self.ask("snapshot", &[&[file, "--then", then], arguments].concat())
    }

    /// Saves the VM, ends it, and waits for its end.
    ///
    /// # Errors
    /// The verb fails, or the process ends with another status than 0.
    pub fn snapshot_and_stop(mut self, file: &Path) -> Result<serde_json::Value> {
        let summary = self.snapshot(file, "stop")?;
        let status = self.wait()?;
        ensure!(status == 0, "after its snapshot vmm ended with status {status}:\n{}", self.tail());
        Ok(summary)
    }

    /// Waits for the process to end and returns its status.
    ///
    /// # Errors
    /// [`LIMIT`] passes, or a signal killed it.
    pub fn wait(&mut self) -> Result<i32> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                self.seen.extend(self.lines.iter().map(|(line, _)| line));
                return status.code().with_context(|| format!("vmm was killed: {status}\n{}", self.tail()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("vmm does not end; its last lines were:\n{}", self.tail())
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: the child has not been waited for, so its id is its own.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        ensure!(sent == 0, "cannot send signal {signal}");
        Ok(())
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When the line came that was handed out last.
    pub fn last_arrival(&self) -> Arrival {
        self.last
    }

    /// All lines so far.
    pub fn seen(&self) -> &[String] {
        &self.seen
    }

    /// The last lines, with those that nobody has waited for.
    pub fn last_lines(&mut self) -> String {
        self.seen.extend(self.lines.try_iter().map(|(line, _)| line));
        self.tail()
    }

    /// The control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn wait_for_socket(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(&self.socket).is_err() {
            ensure!(Instant::now() < deadline, "no control socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let (before, last) = self.seen.split_at(self.seen.len().saturating_sub(30));
        // A guest that goes on says much, and hides what the monitor said before.
        let own = before.iter().filter(|line| line.contains("vmm: "));
        own.chain(last).map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// What those said last that had ended by themselves when nobody wanted them any more.
static ENDED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The last lines of each VM that has ended by itself since this was called last: who asked it for something may have heard no more than that
/// it is gone.
pub fn ended_by_themselves() -> Vec<String> {
    ENDED.lock().map(|mut words| std::mem::take(&mut *words)).unwrap_or_default()
}

impl Drop for TestVm {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_)))
            && let Ok(mut words) = ENDED.lock()
        {
            words.push(self.last_lines());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A test that is killed drops nothing; its machines end all the same.
fn die_with_the_test() -> io::Result<()> {
    // SAFETY: the call takes a signal number and no pointers.
    let set = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lines as they come; a last one without an end of line counts.
fn lines_of(output: PipeReader) -> Receiver<(String, Arrival)> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send((text, Arrival::now())).is_err() {
                return;
            }
        }
    });
    receiver
}
