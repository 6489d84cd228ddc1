//! Guest RAM that is lost while the guest runs: its snapshot was shortened, or cannot be read any more.
//!
//! In: where a snapshot's RAM is mapped, and SIGBUS, by which the kernel answers a load from what is gone. Out: one line, the
//! terminal given back, and the end of the process with status 1. Holds: the handler makes only calls that a handler may
//! make (signal-safety(7)); a SIGBUS by memory that is another's is left to who handled it before, and one that somebody sends ends the process, as
//! it would any.
//!
//! System calls that touch such RAM fail, KVM's among them, and so do `read` and `write`; they are told by their callers ([`Watch::why`] helps
//! them). What is left is the devices' own loads and stores, in the middle of anything: nothing could go on after them.

mod copy;

pub(crate) use copy::Gone;
use std::fs::File;
use std::mem::zeroed;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Once, OnceLock};

/// The process's exit status: that of a monitor that failed.
const STATUS: libc::c_int = 1;

/// RAM that is looked after while this lives.
#[derive(Debug)]
pub struct Watch {
    watched: &'static Watched,
    /// Open for as long as the handler may ask for its length.
    _snapshot: Arc<File>,
}

/// What the handler needs, made before it is needed. Never freed, so that it can be looked at any time: some 300 bytes for each
/// restore in this process.
#[derive(Debug)]
struct Watched {
    /// Whether there is a [`Watch`].
    live: AtomicBool,
    next: Option<&'static Watched>,
    /// Where RAM is in this process.
    ranges: Vec<Range<usize>>,
    snapshot: RawFd,
    /// Where RAM ends in the snapshot.
    end: u64,
    shortened: String,
    unreadable: String,
}

/// The first of the list.
static WATCHED: AtomicPtr<Watched> = AtomicPtr::new(ptr::null_mut());
static EARLIER: OnceLock<libc::sigaction> = OnceLock::new();
static BEFORE_END: OnceLock<fn()> = OnceLock::new();
static ENDING: AtomicBool = AtomicBool::new(false);

/// Has the process end in good order if RAM at these addresses is lost, which is mapped from the snapshot at `path` up to offset
/// `end`.
pub fn watch(path: &Path, snapshot: &Arc<File>, ranges: Vec<Range<usize>>, end: u64) -> Watch {
    let name = path.display().to_string().escape_debug().to_string();
    let watched = Watched {
        live: AtomicBool::new(true),
        next: None,
        ranges,
        snapshot: snapshot.as_raw_fd(),
        end,
        shortened: format!("{name} was shortened while a guest runs from it: the guest's memory is lost\n"),
        unreadable: format!("{name} cannot be read while a guest runs from it: the guest's memory is lost\n"),
    };
    let watched = watched.enlist();
    handle();
    Watch { watched, _snapshot: snapshot.clone() }
}

/// Copies out of memory that may be gone, as RAM that is looked after may be.
///
/// # Safety
/// As many bytes from the address on, in this process, lie in a mapping that can be read, and nobody has a reference to them.
pub(crate) unsafe fn read(address: u64, buf: &mut [u8]) -> Result<(), Gone> {
    handle();
    // SAFETY: the handler is set; the rest is the caller's word.
    unsafe { copy::bytes(address as *const u8, buf.as_mut_ptr(), buf.len()) }
}

/// Copies into memory that may be gone.
///
/// # Safety
/// The same, and the mapping can be written.
pub(crate) unsafe fn write(address: u64, bytes: &[u8]) -> Result<(), Gone> {
    handle();
    // SAFETY: the handler is set; the rest is the caller's word.
    unsafe { copy::bytes(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Has `act` called before the process ends here. It may do only what a signal handler may. The first one stays.
pub fn before_end(act: fn()) {
    let _ = BEFORE_END.set(act);
}

impl Watch {
    /// Why RAM was found missing, if that is so: the snapshot is shorter than it was.
    pub fn why(&self) -> Option<&'static str> {
        self.watched.is_shortened().then(|| self.watched.shortened.trim_end())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watched.live.store(false, Ordering::SeqCst);
    }
}

impl Watched {
    /// Puts it before the first.
    fn enlist(self) -> &'static Self {
        let new = Box::leak(Box::new(self));
        loop {
            let first = WATCHED.load(Ordering::Acquire);
            // SAFETY: null, or a box that was leaked whole before the pointer was stored.
            new.next = unsafe { first.as_ref() };
            if WATCHED.compare_exchange(first, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return new;
            }
        }
    }

    fn holds(&self, address: usize) -> bool {
        self.live.load(Ordering::SeqCst) && self.ranges.iter().any(|range| range.contains(&address))
    }

    fn is_shortened(&self) -> bool {
        // SAFETY: a stat is plain numbers, for which zero is a value.
        let mut stat: libc::stat = unsafe { zeroed() };
        // SAFETY: any number will do for a descriptor, and the kernel writes one stat.
        let told = unsafe { libc::fstat(self.snapshot, &mut stat) } == 0;
        told && (stat.st_size as u64) < self.end
    }
}

/// The RAM that has this address, if it is looked after.
fn find(address: usize) -> Option<&'static Watched> {
    // SAFETY: null, or a box that was leaked whole before the pointer was stored.
    let first = unsafe { WATCHED.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |watched| watched.next).find(|watched| watched.holds(address))
}

/// Sets the handler, once.
fn handle() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(set);
}

/// On an alternate stack if the thread has one, as Rust's own, which it may have to give way to.
fn set() {
    // SAFETY: a sigaction is plain numbers, for which zero is a value.
    let (mut ours, mut earlier): (libc::sigaction, libc::sigaction) = unsafe { zeroed() };
    ours.sa_sigaction = lost as extern "C" fn(_, _, _) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: whole sigactions, and a handler of the kind that SA_SIGINFO says. The earlier one is known before it is needed.
    unsafe {
        libc::sigaction(libc::SIGBUS, ptr::null(), &mut earlier);
        let _ = EARLIER.set(earlier);
        libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut());
    }
}

extern "C" fn lost(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo.
    let info = unsafe { &*info };
    match info.si_code {
        // sigaction(2): what the kernel itself has to tell is above.
        ..=libc::SI_USER => end_by_signal(),
        // Memory that nobody has touched yet: it may be heeded, and is told again when somebody does.
        libc::BUS_MCEERR_AO => return,
        _ => {}
    }
    // SAFETY: the kernel's context.
    if unsafe { copy::give_up(context) } {
        return;
    }
    // SAFETY: the kernel's SIGBUS has an address.
    match find(unsafe { info.si_addr() } as usize) {
        Some(watched) => end(watched),
        // The instruction runs again, faults again, and is the earlier handler's.
        None => give_way(),
    }
}

fn give_way() {
    let earlier = EARLIER.get().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: null, which changes nothing, or what sigaction itself has told.
    unsafe { libc::sigaction(libc::SIGBUS, earlier, ptr::null_mut()) };
}

/// Nothing is lost, but somebody wants the process to end. The first of a PID namespace outlives that signal, and ends with the status that a
/// shell has for it.
fn end_by_signal() -> ! {
    begin_end();
    // SAFETY: a set of signals is plain numbers, for which zero is a value, and SIGBUS the one in it. The signal's default is to end the process.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigaddset(&mut set, libc::SIGBUS);
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
        libc::raise(libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
        libc::_exit(128 + libc::SIGBUS)
    }
}

/// For one thread only; another waits for the end.
fn begin_end() {
    while ENDING.swap(true, Ordering::SeqCst) {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
    if let Some(act) = BEFORE_END.get() {
        act();
    }
}

fn end(watched: &Watched) -> ! {
    begin_end();
    say("vmm: ");
    say(if watched.is_shortened() { &watched.shortened } else { &watched.unreadable });
    // SAFETY: ends all threads; nothing is run.
    unsafe { libc::_exit(STATUS) }
}

fn say(text: &str) {
    // SAFETY: as many bytes as there are. Where standard error takes nothing, nothing can be done.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
