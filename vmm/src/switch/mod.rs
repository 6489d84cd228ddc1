//! Kernels that take turns on one machine's devices: one is awake, any number sleep.
//!
//! In: a kernel to boot, or the name of one that sleeps. Out: it is awake, and the one that was is asleep, in memory or in a
//! file. Holds: falling asleep is a capture and waking up is a restore, the same two functions as for a file; what can't wake
//! up stays asleep, and then the one that was awake goes on.
//!
//! ```text
//!  awake ── capture ──► state + RAM ──► asleep        one VM at a time has the host's ends: tap, sockets, console.
//!  asleep ─ state + RAM ── from_state ──► awake       A sleeper keeps its RAM where it is, and its disks open and locked.
//! ```

mod adopt;
mod beside;
mod error;
mod image;
mod prepare;
mod sleeper;
mod told;
mod trial;

pub use adopt::AdoptError;
use beside::Beside;
pub use error::SwitchError;
use image::Image;
pub use image::{IMAGE_DISK, ImageWish};
use sleeper::{Place, Ready, Sleeper};
pub use told::{Kept, KernelInfo, Newcomer, Next, Switched, Terms};

use crate::clock::TimePolicy;
use crate::disk::DiskCare;
use crate::load;
use crate::machine::Machine;
use crate::restore::HostEnds;
use crate::save::Wish;
use kvm_ioctls::Kvm;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The kernel that is awake.
struct Awake {
    name: String,
    source: PathBuf,
    machine: Machine,
    /// Of an image kernel.
    image: Option<Image>,
    /// Whether what it writes to disks is kept only if it is accepted.
    on_trial: bool,
}

/// What [`Kernels`] holds at every time that it can be asked.
const SOMEBODY: &str = "a kernel is awake";

/// Makes the host's ends that every kernel has in turn.
pub type Ends = Box<dyn Fn() -> HostEnds + Send>;

/// The kernels of this process.
pub struct Kernels {
    kvm: Kvm,
    ends: Ends,
    /// None only while one takes the place of another.
    awake: Option<Awake>,
    asleep: Vec<Sleeper>,
    beside: Option<Beside>,
}

impl Kernels {
    /// One kernel, awake.
    pub fn new(kvm: Kvm, machine: Machine, source: PathBuf, ends: Ends) -> Self {
        let name = machine.shape().name.clone();
        let awake = Some(Awake { name, source, machine, image: None, on_trial: false });
        Self { kvm, ends, awake, asleep: Vec::new(), beside: None }
    }

    /// The machine of the one that is awake.
    ///
    /// # Panics
    /// After [`SwitchError::Both`], when there is nothing left but to end.
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.awake.as_mut().expect(SOMEBODY).machine
    }

    /// The same, to look at.
    ///
    /// # Panics
    /// As [`Kernels::machine`].
    pub fn awake(&self) -> &Machine {
        &self.awake.as_ref().expect(SOMEBODY).machine
    }

    /// The name and the origin of the one that is awake.
    ///
    /// # Panics
    /// As [`Kernels::machine`].
    pub fn origin(&self) -> (&str, &PathBuf) {
        let awake = self.awake.as_ref().expect(SOMEBODY);
        (&awake.name, &awake.source)
    }

    /// Who fell asleep last.
    pub fn last_asleep(&self) -> Option<String> {
        self.asleep.last().map(|sleeper| sleeper.name.clone())
    }

    /// All of them, the one that is awake first.
    pub fn list(&self) -> Vec<KernelInfo> {
        let awake = self.awake.iter().map(|awake| KernelInfo {
            name: awake.name.clone(),
            shape: awake.machine.shape().clone(),
            asleep: None,
            file: None,
            resident: awake.machine.ram().resident_bytes(),
            beside: false,
            vsock: None,
            ended: None,
            on_trial: awake.on_trial,
        });
        awake
            .chain(self.asleep.iter().map(Sleeper::info))
            .chain(self.beside.iter().map(Beside::info))
            .collect()
    }

    /// Drops one that sleeps, or runs beside; a file that it slept in stays.
    ///
    /// # Errors
    /// Nobody sleeps under this name, or an image kernel is shown it.
    pub fn forget(&mut self, name: &str) -> Result<(), SwitchError> {
        if self.forget_beside(name) {
            return Ok(());
        }
        let index = self.find(name)?;
        if self.image().is_some_and(|image| image.of() == name) {
            return Err(SwitchError::Shown(name.to_owned()));
        }
        self.expect_no_trial()?;
        self.asleep.remove(index);
        Ok(())
    }

    /// Puts the awake kernel to sleep, in a file if one is named, and has the other run. An image kernel doesn't sleep, nor does one on
    /// trial: once the other runs it is no more.
    ///
    /// # Errors
    /// See [`SwitchError`].
    pub fn switch(&mut self, next: &Next, terms: Terms) -> Result<Switched, SwitchError> {
        let Terms { keep_in: file, trial } = terms;
        if file.is_some() || matches!(next, Next::Boot(Newcomer { image: Some(_), .. })) {
            self.check_can_be_kept()?;
        }
        if !matches!(next, Next::Wake(..)) {
            self.expect_no_trial()?;
        }
        if matches!(next, Next::Wake(name, _) if self.is_beside(name)) {
            self.put_beside_to_bed()?;
        }
        let mut ready = self.prepare(next)?;
        if trial {
            trial::put_on_trial(&mut ready)?;
        }
        // Such disks can only be those of the one that falls asleep, whichever of the two had them first.
        let shared = ready.disks.iter().any(|disk| !disk.file.read_only);
        let started = Instant::now();
        let asleep = self.fall_asleep(file)?;
        let saved = if matches!(asleep.place, Place::File(_)) { started.elapsed() } else { Duration::ZERO };
        let switched = Switched {
            from: asleep.name.clone(),
            ended: asleep.image.is_some() || asleep.on_trial,
            on_trial: asleep.on_trial,
            unfinished: asleep.image.as_ref().and_then(Image::unfinished),
            to: ready.name.clone(),
            pause: Duration::ZERO,
            saved,
        };
        let image = match next {
            Next::Boot(newcomer) => newcomer.image.as_ref(),
            Next::Wake(..) | Next::Snapshot(_) => None,
        };
        self.hand_over(ready, asleep, shared, image)?;
        Ok(Switched { pause: started.elapsed(), ..switched })
    }

    /// Has the one that fell asleep last run in place of one that has ended. Returns how long nobody ran.
    ///
    /// # Errors
    /// It can't wake up; then nobody is awake.
    pub fn replace_ended(&mut self) -> Result<Duration, SwitchError> {
        let started = Instant::now();
        let name = self.last_asleep().ok_or(SwitchError::Ending)?;
        let ready = self.prepare(&Next::Wake(name.clone(), TimePolicy::Advance))?;
        if let Some(ended) = self.awake.take() {
            ended.machine.dismantle();
        }
        self.run(ready, None)?;
        self.asleep.retain(|sleeper| sleeper.name != name);
        Ok(started.elapsed())
    }

    /// Whether a kernel has this name.
    fn is_known(&self, name: &str) -> bool {
        let mut asleep = self.asleep.iter();
        self.origin().0 == name || self.is_beside(name) || asleep.any(|sleeper| sleeper.name == name)
    }

    fn find(&self, name: &str) -> Result<usize, SwitchError> {
        self.asleep.iter().position(|sleeper| sleeper.name == name).ok_or_else(|| {
            let names: Vec<_> = self.asleep.iter().map(|sleeper| sleeper.name.as_str()).collect();
            let known = if names.is_empty() { "none does".to_owned() } else { names.join(", ") };
            SwitchError::Unknown { name: name.to_owned(), known }
        })
    }

    /// Takes the awake kernel off its VM. If its state can't be read or written it stays awake.
    fn fall_asleep(&mut self, file: Option<PathBuf>) -> Result<Sleeper, SwitchError> {
        let awake = self.awake.as_mut().ok_or(SwitchError::Ending)?;
        let paused = awake.machine.pause();
        if paused.has_ended() {
            return Err(SwitchError::Ending);
        }
        // One capture, so that state and RAM are of one instant: a second would let the devices finish more.
        let (state, kept) = match file {
            None => (paused.capture()?, None),
            Some(path) => {
                paused.save(Wish::new(&path, DiskCare::default()), &mut |_, _| {})?;
                let snapshot = load::open(&path)?;
                (load::state(&snapshot)?, Some(Box::new(snapshot)))
            }
        };
        paused.keep();
        let Awake { name, source, machine, image, on_trial } =
            self.awake.take().ok_or(SwitchError::Ending)?;
        let (ram, disks) = machine.dismantle();
        let place = kept.map_or(Place::Memory(ram), Place::File);
        let (stamps, since) = (Vec::new(), Instant::now());
        Ok(Sleeper { name, source, state, place, disks, stamps, since, image, on_trial, stranger: false })
    }

    fn hand_over(
        &mut self,
        mut ready: Ready,
        mut asleep: Sleeper,
        shared: bool,
        image: Option<&ImageWish>,
    ) -> Result<(), SwitchError> {
        let to = ready.name.clone();
        let stamped = if shared { asleep.stamp() } else { Ok(()) };
        let image =
            stamped.and_then(|()| image.map(|wish| image::show(&mut ready, &asleep, wish)).transpose());
        if let Err(first) = image.and_then(|image| self.run(ready, image)) {
            let own = asleep.image.take();
            let back = asleep.ready(TimePolicy::Freeze).and_then(|ready| self.run(ready, own));
            let both = |second: SwitchError| SwitchError::Both {
                first: first.to_string(),
                second: second.to_string(),
            };
            return back.map_err(both).and(Err(first));
        }
        self.asleep.retain(|sleeper| sleeper.name != to);
        if asleep.image.is_none() && !asleep.on_trial {
            self.asleep.push(asleep);
        }
        Ok(())
    }

    fn run(&mut self, ready: Ready, image: Option<Image>) -> Result<(), SwitchError> {
        let ends = HostEnds { disks: ready.disks, ..(self.ends)() };
        let mut machine = Machine::from_state(&self.kvm, &ready.state, ready.ram, ready.time, ends)
            .map_err(|source| SwitchError::Wake { name: ready.name.clone(), source })?;
        machine.generation = ready.generation;
        machine.resume();
        let Ready { name, source, on_trial, .. } = ready;
        self.awake = Some(Awake { name, source, machine, image, on_trial });
        Ok(())
    }
}
