//! How long a restored guest took to run, and to have the memory that it works with.
//!
//! In: marks that the vCPUs' threads leave, and the faults that the host counts for them. Out: one line. Holds: nothing waits for any
//! of it on the way to the first instruction, which costs two readings of a clock more.
//!
//! ```text
//! process start ─── call ─── first KVM_RUN entered ─ first instruction ─ first exit answered ─── last fault ─── quiet
//!     └ the kernel made it     └ arguments parsed      └ somewhere between these two │             of the working set
//! ```

use rustix::process::getpid;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::fs::{self, File};
use std::io;
use std::mem::zeroed;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// How often faults are counted.
const LOOK: Duration = Duration::from_millis(1);
/// A guest that needs no new memory for so long has its working set.
const QUIET: u64 = 100_000_000;
/// And this often: where all of the host stood still, nobody has been quiet.
const QUIET_LOOKS: u32 = 50;
/// One that goes on for longer has none that could be told.
const PATIENCE: u64 = 10_000_000_000;

/// When a machine's vCPUs first ran, in nanoseconds of the host's monotonic clock.
#[derive(Debug, Default)]
pub struct FirstRun {
    faults_before: OnceLock<u64>,
    entered: OnceLock<u64>,
    answered: OnceLock<u64>,
}

impl FirstRun {
    /// The calling thread, which had other things to do, is a vCPU's from now on: what it has faulted for until now is not for the guest.
    pub fn sit(&self) {
        self.faults_before.get_or_init(own_faults);
    }

    /// A vCPU is about to enter `KVM_RUN`.
    pub fn enter(&self) {
        self.entered.get_or_init(now);
    }

    /// Whether a vCPU's exit has been answered.
    pub fn is_answered(&self) -> bool {
        self.answered.get().is_some()
    }

    /// A vCPU's exit has been answered: by now the guest has run its first instruction.
    pub fn answer(&self) {
        self.answered.get_or_init(now);
    }
}

/// Where a restore began, in nanoseconds of the host's monotonic clock.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Begun {
    /// When the kernel made this process, as far as it can tell; see [`Begun::now`].
    process_ns: u64,
    /// When its arguments had been read.
    call_ns: u64,
}

impl Begun {
    /// The call is now. That the process was made as long ago as it has had a processor, or waited for one, is true while it has
    /// waited for nothing else: a program that has to be read from a disk first was made earlier than this says.
    ///
    /// # Errors
    /// The host doesn't tell how long the process waited for a processor.
    pub fn now() -> io::Result<Self> {
        let waited = words(&fs::read_to_string("/proc/self/schedstat")?).nth(1).unwrap_or(0);
        let ran = nanoseconds(ClockId::ProcessCPUTime);
        let call_ns = now();
        Ok(Self { process_ns: call_ns.saturating_sub(ran + waited), call_ns })
    }
}

/// What there is to tell. Times are in nanoseconds of the host's monotonic clock.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// Where it began.
    #[serde(flatten)]
    begun: Begun,
    /// When the first vCPU entered `KVM_RUN` for the first time.
    entered_ns: u64,
    /// When the first exit had been answered; none, if none was.
    answered_ns: Option<u64>,
    /// The last fault before the guest was quiet.
    last_fault_ns: u64,
    /// Faults of the vCPUs' threads until then.
    faults: u64,
    /// Whether it has been quiet.
    settled: bool,
}

/// What was seen of a guest that was let run.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    entered_ns: u64,
    answered_ns: Option<u64>,
    last_fault_ns: u64,
    faults: u64,
    quiet: bool,
}

/// Waits until a guest that has been let run needs no new memory. `None` if it did not run, or the process ends.
pub fn settle(first: &FirstRun) -> Option<Settled> {
    let start = now();
    // One that sleeps may have no exit that is answered here.
    while first.answered.get().is_none() && now() - start < PATIENCE {
        std::thread::sleep(LOOK);
    }
    let (entered_ns, answered_ns) = (*first.entered.get()?, first.answered.get().copied());
    // Now all of the threads have their names.
    let faults = Faults::of("vcpu").ok()?;
    let start = now();
    let (mut count, mut at, mut looks) = (faults.count()?, start, 0);
    let quiet = loop {
        std::thread::sleep(LOOK);
        let (seen, time) = (faults.count()?, now());
        looks += 1;
        if seen != count {
            (count, at, looks) = (seen, time, 0);
        }
        let quiet = time - at >= QUIET && looks >= QUIET_LOOKS;
        if quiet || time - start >= PATIENCE {
            break quiet;
        }
    };
    let before = first.faults_before.get().copied().unwrap_or(0);
    let faults = count.of_threads.saturating_sub(before);
    Some(Settled { entered_ns, answered_ns, last_fault_ns: at, faults, quiet })
}

/// The same, with where it began.
pub fn watch(begun: Begun, first: &FirstRun) -> Option<Timing> {
    let Settled { entered_ns, answered_ns, last_fault_ns, faults, quiet } = settle(first)?;
    Some(Timing { begun, entered_ns, answered_ns, last_fault_ns, faults, settled: quiet })
}

impl Timing {
    /// As one line.
    pub fn line(&self) -> String {
        let Self { begun: Begun { process_ns, call_ns }, entered_ns, answered_ns, last_fault_ns, .. } = self;
        let from = |start: &u64, end: &u64| format!("{:.2}", end.saturating_sub(*start) as f64 / 1e6);
        let [call, entered] = [from(process_ns, call_ns), from(call_ns, entered_ns)];
        let answered =
            answered_ns.map(|at| format!("{} ms until the first exit was answered", from(call_ns, &at)));
        let answered = answered.unwrap_or_else(|| "no exit answered so far".to_owned());
        let fault = from(call_ns, last_fault_ns);
        let settled = if self.settled { "" } else { " so far" };
        format!(
            "timing: {call} ms from the process's start to the call; from the call {entered} ms to the first KVM_RUN, {answered}, \
             {fault} ms to the last of {} faults{settled}",
            self.faults
        )
    }

    /// As JSON, on one line.
    pub fn json(&self) -> String {
        serde_json::json!({ "timing": self }).to_string()
    }
}

/// Now, in nanoseconds of the host's monotonic clock.
pub fn now() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Page faults of the calling thread so far, minor and major (getrusage(2)).
fn own_faults() -> u64 {
    // SAFETY: plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { zeroed() };
    // SAFETY: the call fills what it is given, which lives until it is over.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    (usage.ru_minflt + usage.ru_majflt) as u64
}

/// Faults of threads, and how much memory their process has: KVM may have a page fetched by the kernel in the background, which is
/// nobody's fault then, but makes the process larger.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Count {
    of_threads: u64,
    resident: u64,
}

struct Faults {
    threads: Vec<File>,
    memory: File,
}

impl Faults {
    /// Those of this process's threads whose names begin so, and of the first one.
    fn of(name: &str) -> io::Result<Self> {
        let first = getpid().to_string();
        let tasks = fs::read_dir("/proc/self/task")?.flatten().map(|task| task.path());
        let named = |found: String| found.starts_with(name);
        let is_one =
            |task: &PathBuf| task.ends_with(&first) || fs::read_to_string(task.join("comm")).is_ok_and(named);
        let threads = tasks.filter(is_one);
        let threads = threads.map(|task| File::open(task.join("stat"))).collect::<io::Result<_>>()?;
        Ok(Self { threads, memory: File::open(format!("/proc/{}/statm", getpid().as_raw_nonzero()))? })
    }

    /// Page faults so far, minor and major (proc_pid_stat(5), fields 10 and 12; proc_pid_statm(5), field 2).
    fn count(&self) -> Option<Count> {
        let faults = |stat: &File| {
            let text = text(stat)?;
            let (_, after_name) = text.rsplit_once(')')?;
            let numbers: Vec<_> = after_name.split_ascii_whitespace().skip(7).take(3).collect();
            Some(numbers.first()?.parse::<u64>().ok()? + numbers.get(2)?.parse::<u64>().ok()?)
        };
        let of_threads = self.threads.iter().map(faults).sum::<Option<u64>>()?;
        Some(Count { of_threads, resident: words(&text(&self.memory)?).nth(1)? })
    }
}

fn text(file: &File) -> Option<String> {
    let mut bytes = [0; 1024];
    let length = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

fn words(text: &str) -> impl Iterator<Item = u64> {
    text.split_ascii_whitespace().map_while(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn the_process_was_made_before_the_call() {
        let begun = Begun::now().unwrap();
        assert!(0 < begun.process_ns && begun.process_ns < begun.call_ns);
    }

    #[test]
    fn the_first_run_is_the_first() {
        let first = FirstRun::default();
        first.enter();
        let entered = first.entered.get().copied();
        first.answer();
        first.enter();
        assert_eq!(first.entered.get().copied(), entered);
        assert!(first.answered.get() >= first.entered.get());
    }

    #[test]
    fn a_line_tells_what_passed() {
        let begun = Begun { process_ns: 1_000_000, call_ns: 1_500_000 };
        let timing = Timing {
            begun,
            entered_ns: 3_000_000,
            answered_ns: Some(3_250_000),
            last_fault_ns: 11_500_000,
            faults: 7,
            settled: false,
        };
        assert_eq!(
            timing.line(),
            "timing: 0.50 ms from the process's start to the call; from the call 1.50 ms to the first KVM_RUN, 1.75 ms until the first \
             exit was answered, 10.00 ms to the last of 7 faults so far"
        );
        let json: serde_json::Value = serde_json::from_str(&timing.json()).unwrap();
        assert_eq!(json["timing"]["call_ns"], 1_500_000);
        let asleep = Timing { answered_ns: None, ..timing };
        assert!(asleep.line().contains("to the first KVM_RUN, no exit answered so far, 10.00 ms to"));
    }

    #[test]
    fn a_threads_faults_are_counted() {
        let ((tell, started), (done, wait)) = (channel(), channel::<()>());
        let touch = move || {
            // So much comes from the kernel, untouched; a stack may be an earlier thread's.
            let touched = std::hint::black_box(vec![1; 1 << 20]);
            tell.send(()).unwrap();
            let _ = wait.recv();
            drop(touched);
        };
        let thread = std::thread::Builder::new().name("faulty7".to_owned()).spawn(touch).unwrap();
        started.recv().unwrap();
        let faults = Faults::of("faulty").unwrap();
        // It, and the first one.
        assert_eq!(faults.threads.len(), 2);
        let count = faults.count().unwrap();
        assert!(count.of_threads > 0 && count.resident > 0);
        drop(done);
        thread.join().unwrap();
    }
}
