//! Stories of guests that come back later: what their clocks say, what their timers do, what random numbers they draw.
//!
//! In Linux's stories the time between is made up: the host's clock is set, as if the snapshot had lain there so long.

use super::host_clock::HostClock;
use crate::forge;
use crate::guests::Guest;
use crate::vm::{Arrival, TestVm};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// What a Linux guest is told to run so that it tells the time, and wakes up once.
pub const TELL_TIME: &str = "modprobe ptp_kvm; witness clocks & sleep 40; echo woke";
/// The same, for one whose wall clock others set.
pub const TELL_ONLY_TIME: &str = "witness clocks";
/// The same, for one that sets its wall clock by the RTC.
pub const TELL_TIME_BY_RTC: &str = "witness clocks & while sleep 0.5; do hwclock -su; done";
/// The same, for one that has no agent to do it.
pub const TELL_TIME_WITHOUT_AGENT: &str =
    "until killall vmm-agent; do sleep 0.1; done; witness clocks & while sleep 0.5; do hwclock -su; done";

const SECOND: i64 = 1_000_000_000;
/// How long [`TELL_TIME`] sleeps.
const NAP: i64 = 40 * SECOND;
/// How long a restored guest is watched: its watchdogs look every four seconds.
const WATCH: i64 = 6 * SECOND;
/// Made-up times in seconds, and the policy for each. The last is a host whose clock was set back.
const GAPS: [(&str, i64); 6] = [
    ("advance", 1),
    ("advance", 60),
    ("advance", 86_400),
    ("freeze", 60),
    ("step", 60),
    ("advance", -86_400),
];
/// What a kernel says when it thinks that its CPUs or its clocks stood still.
const REPORTS: [&str; 6] =
    ["lockup", "LOCKUP", "detected stall", "expedited stall", "unstable", "blocked for more than"];

/// What a guest's clocks may be apart after a restore: 500 ppm of the half second between two looks of its clock watchdog.
const SKEW: u64 = 250_000;

/// A line of `witness clocks`, in nanoseconds.
#[derive(Clone, Debug)]
struct Clocks {
    monotonic: i64,
    /// When the line came.
    at: Instant,
    /// By which each clock was behind the host's then; what the line took on its way included.
    wall_lag: i64,
    rtc_lag: i64,
    ptp_lag: Option<i64>,
    random: String,
}

impl Clocks {
    /// The next whole line: the kernel may write one of its own in the midst of another.
    fn next(vm: &mut TestVm) -> Result<Self> {
        loop {
            let line = vm.wait_for("clocks realtime=")?;
            if let Some(clocks) = Self::parse(&line, vm.last_arrival()) {
                return Ok(clocks);
            }
        }
    }

    fn parse(line: &str, Arrival { at, wall }: Arrival) -> Option<Self> {
        let now = wall.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_nanos() as i64;
        let field = |name: &str| line.split(name).nth(1)?.split(' ').next();
        let number = |name: &str| field(name)?.parse::<i64>().ok();
        Some(Self {
            monotonic: number("monotonic=")?,
            at,
            wall_lag: now - number("realtime=")?,
            rtc_lag: now - number("rtc=")? * SECOND,
            ptp_lag: number("ptp=").map(|ptp| now - ptp),
            random: field("random=").filter(|bytes| bytes.len() == 32)?.to_owned(),
        })
    }
}

/// A guest whose snapshot is restored again and again.
struct Kept<'a> {
    guest: &'a Guest,
    file: &'a Path,
    /// Its first and its last line.
    first: Clocks,
    last: Clocks,
}

impl<'a> Kept<'a> {
    fn keep(guest: &'a Guest, file: &'a Path) -> Result<Self> {
        let mut vm = TestVm::start(&guest.run_args())?;
        let first = Clocks::next(&mut vm)?;
        let last = (0..3).map(|_| Clocks::next(&mut vm)).last().context("no line")??;
        vm.snapshot_and_stop(file)?;
        Ok(Self { guest, file, first, last })
    }

    fn restore(&self, policy: &str) -> Result<TestVm> {
        let file = self.file.display().to_string();
        TestVm::start(&["restore".to_owned(), file, "--time".to_owned(), policy.to_owned()])
    }

    /// Lines of the restored guest for some seconds of its own time, in which its clock doesn't go back and its kernel has
    /// nothing to complain of.
    fn watch(&self, vm: &mut TestVm) -> Result<Vec<Clocks>> {
        // Part of the first line may have been read before the snapshot.
        Clocks::next(vm)?;
        let mut lines = vec![Clocks::next(vm)?];
        ensure!(lines[0].monotonic >= self.last.monotonic, "{}: the clock went back", self.guest.name);
        while lines[lines.len() - 1].monotonic - lines[0].monotonic < WATCH {
            let next = Clocks::next(vm)?;
            ensure!(
                next.monotonic >= lines[lines.len() - 1].monotonic,
                "{}: time went back",
                self.guest.name
            );
            lines.push(next);
        }
        let report = complaint(vm.seen());
        ensure!(report.is_none(), "{}: its kernel says: {report:?}", self.guest.name);
        Ok(lines)
    }

    /// Guest time since the snapshot less real time, in nanoseconds, at the last of these lines.
    fn gained(&self, lines: &[Clocks]) -> i64 {
        let last = &lines[lines.len() - 1];
        last.monotonic - self.last.monotonic - (last.at - self.last.at).as_nanos() as i64
    }
}

/// What the kernel has to complain of, if anything. Linux 7.2 runs a clock watchdog that is late once for each period that it
/// missed, a few microseconds apart, and is content with no skew at all then; so what it measured is judged here.
fn complaint(seen: &[String]) -> Option<&String> {
    let reports = |line: &String| REPORTS.iter().any(|report| line.contains(report));
    let excused = |at| skew(&seen[at..]).is_some_and(|skew| skew < SKEW);
    (0..seen.len()).find(|&at| reports(&seen[at]) && !excused(at)).map(|at| &seen[at])
}

/// Nanoseconds by which the intervals differ that follow a report of a frequency skew.
fn skew(lines: &[String]) -> Option<u64> {
    lines[0].contains("due to frequency skew").then_some(())?;
    let intervals = lines.iter().filter_map(|line| {
        let digits = line.split("interval:").nth(1)?.trim().strip_suffix("ns")?;
        digits.parse::<u64>().ok()
    });
    let intervals: Vec<_> = intervals.take(2).collect();
    (intervals.len() == 2).then(|| intervals[0].abs_diff(intervals[1]))
}

/// A guest comes back after a second, a minute and a day, with every policy.
///
/// # Errors
/// A clock that is not where the policy wants it, a timer that fired twice or not at all, or a report of the kernel's.
pub fn comes_back_later(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut clock = HostClock::of_the_lab()?;
    let kept = Kept::keep(guest, &file)?;
    for (policy, seconds) in GAPS {
        clock.shift(seconds)?;
        let told = one_gap(&kept, policy, seconds * SECOND);
        told.with_context(|| format!("{}: {policy} over {seconds} s", guest.name))?;
    }
    Ok(())
}

fn one_gap(kept: &Kept, policy: &str, gap: i64) -> Result<()> {
    let mut vm = kept.restore(policy)?;
    let lines = kept.watch(&mut vm)?;
    let wall_lag = least(lines.iter().map(|line| line.wall_lag));
    let gained = kept.gained(&lines);
    println!("  {policy} {} s: wall clock {} ms behind", gap / SECOND, wall_lag / 1_000_000);
    if policy == "advance" && gap > 0 {
        ensure!(wall_lag.abs() < SECOND, "the wall clock is {wall_lag} ns behind the host's");
        ensure!(gained > gap - SECOND, "guest time gained {gained} ns");
    } else {
        ensure!(gained < SECOND, "guest time gained {gained} ns");
        ensure!(wall_lag > gap - SECOND, "the wall clock is {wall_lag} ns behind the host's");
    }
    let others = lines.iter().map(|line| line.rtc_lag);
    let (rtc_lag, ptp_lag) = (least(others), least(lines.iter().filter_map(|line| line.ptp_lag)));
    ensure!(rtc_lag.abs() < 2 * SECOND, "the RTC is {rtc_lag} ns behind the host");
    ensure!(ptp_lag.abs() < SECOND, "PTP_KVM is {ptp_lag} ns behind the host");
    woke_once(kept, &vm, &lines)
}

/// Delays on the way of a line only add to what a clock seems to be behind.
fn least(lags: impl Iterator<Item = i64>) -> i64 {
    lags.min().unwrap_or(i64::MAX)
}

/// The sleeper has woken once, if its time has come. It may be about to.
fn woke_once(kept: &Kept, vm: &TestVm, lines: &[Clocks]) -> Result<()> {
    let woke = vm.seen().iter().filter(|line| line.contains("woke")).count();
    let asleep = lines[lines.len() - 1].monotonic - kept.first.monotonic;
    let expected = if asleep < NAP - SECOND { 0..=0 } else { usize::from(asleep > NAP + 2 * SECOND)..=1 };
    ensure!(expected.contains(&woke), "woke {woke} times after {asleep} ns");
    Ok(())
}

/// With `--time step` a guest that asks its RTC has the host's time again to the second, though none has passed for it.
///
/// # Errors
/// Its wall clock stays behind, or its monotonic clock has moved on.
pub fn asks_its_rtc(guest: &Guest, dir: &Path) -> Result<()> {
    steps(guest, dir, "nobody set the guest's wall clock (it has no vsock device)", 2 * SECOND)
}

/// With `--time step` a guest's agent sets its wall clock.
///
/// # Errors
/// As [`asks_its_rtc`].
pub fn has_an_agent(guest: Guest, dir: &Path) -> Result<()> {
    steps(&with_vsock(guest, dir), dir, "the guest's agent has set its wall clock", SECOND)
}

/// With `--time step` a guest whose agent has ended goes on, and `vmm` says that its clock is its own to set.
///
/// # Errors
/// As [`asks_its_rtc`].
pub fn has_lost_its_agent(guest: Guest, dir: &Path) -> Result<()> {
    let words = "nobody set the guest's wall clock (nothing in the guest listens on vsock port";
    steps(&with_vsock(guest, dir), dir, words, 2 * SECOND)
}

fn with_vsock(guest: Guest, dir: &Path) -> Guest {
    guest.argument("--vsock", &dir.join("vsock").display().to_string())
}

fn steps(guest: &Guest, dir: &Path, words: &str, near: i64) -> Result<()> {
    let file = dir.join("snapshot");
    let mut clock = HostClock::of_the_lab()?;
    let kept = Kept::keep(guest, &file)?;
    clock.shift(86_400)?;
    let mut vm = kept.restore("step")?;
    vm.wait_for(&format!("vmm: --time step: {words}"))?;
    let lines = kept.watch(&mut vm)?;
    let (settled, gained) = (&lines[lines.len() / 2..], kept.gained(&lines));
    let wall_lag = least(settled.iter().map(|line| line.wall_lag));
    println!("  step: wall clock {} ms behind", wall_lag / 1_000_000);
    ensure!(wall_lag.abs() < near, "{}: the wall clock is {wall_lag} ns behind", guest.name);
    ensure!(gained < SECOND, "{}: guest time gained {gained} ns", guest.name);
    Ok(())
}

/// By how much the wall clock of a guest that runs `witness clocks` is off.
pub(super) fn wall_lag(vm: &mut TestVm) -> Result<Duration> {
    let lags: Vec<_> = (0..5).map(|_| Clocks::next(vm).map(|line| line.wall_lag)).collect::<Result<_>>()?;
    Ok(Duration::from_nanos(least(lags.into_iter()).unsigned_abs()))
}

/// Two machines go on from one snapshot at the same time, and draw different random bytes once they know.
///
/// # Errors
/// A guest is not told, or both draw the same.
pub fn twins(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let kept = Kept::keep(guest, &file)?;
    let mut twins = [kept.restore("advance")?, kept.restore("advance")?];
    let mut drawn = Vec::new();
    for twin in &mut twins {
        twin.wait_for("crng reseeded due to virtual machine fork")?;
        // What the next line says may have been drawn before the snapshot, and the rest of it read since.
        Clocks::next(twin)?;
        drawn.push([Clocks::next(twin)?.random, Clocks::next(twin)?.random]);
    }
    let [first, second] = &drawn[..] else { unreachable!("two twins") };
    ensure!(first.iter().all(|bytes| !second.contains(bytes)), "{}: both drew {first:?}", guest.name);
    Ok(())
}

/// Guest time advances by an hour, stands still, or at least doesn't go back, with one of our own guests that tells
/// kvmclock. The snapshots are forged: the hour is in what they say of the host's clock.
///
/// # Errors
/// Time went elsewhere.
pub fn an_hour(guest: &Guest, dir: &Path) -> Result<()> {
    let (honest, forged) = (dir.join("honest"), dir.join("forged"));
    let hour = 3600 * SECOND;
    let mut vm = TestVm::start(&guest.run_args())?;
    let before = kvmclock(&mut vm)?;
    vm.snapshot_and_stop(&honest)?;
    for (policy, ago, least, most) in
        [("advance", hour, hour, 2 * hour), ("freeze", hour, 0, hour), ("advance", -hour, 0, hour)]
    {
        forge::state(&honest, &forged, |state| {
            state.vm.clock.realtime = state.vm.clock.realtime.wrapping_add_signed(-ago);
        })?;
        let file = forged.display().to_string();
        let mut vm = TestVm::start(&["restore".to_owned(), file, "--time".to_owned(), policy.to_owned()])?;
        let passed = kvmclock(&mut vm)? - before;
        ensure!((least..most).contains(&passed), "{policy} over {ago} ns: {passed} ns passed");
        (0..5).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    }
    Ok(())
}

fn kvmclock(vm: &mut TestVm) -> Result<i64> {
    let line = vm.wait_for("clock=kvmclock now=")?;
    line.rsplit("now=").next().unwrap_or_default().parse().with_context(|| line.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(watchdog: &str) -> Vec<String> {
        let skewed = "[ 17.2] clocksource: Marking clocksource tsc unstable due to frequency skew";
        let clocksource =
            "[ 17.2] clocksource: Clocksource                  tsc interval:            10435ns";
        ["tick 1", skewed, watchdog, "tick 2", clocksource].map(str::to_owned).to_vec()
    }

    #[test]
    fn a_watchdog_that_was_late_is_excused_and_clocks_that_moved_apart_are_not() {
        let watchdog =
            |ns| format!("[ 17.2] clocksource: Watchdog               kvm-clock interval: {ns:16}ns");
        assert_eq!(complaint(&said(&watchdog(11_057))), None);
        assert!(complaint(&said(&watchdog(500_000_000))).is_some());
        assert!(complaint(&said("no interval")).is_some());
        assert!(complaint(&["watchdog: BUG: soft lockup - CPU#0 stuck for 22s!".to_owned()]).is_some());
    }
}
