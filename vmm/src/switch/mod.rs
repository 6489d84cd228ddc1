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

mod error;
mod image;
mod sleeper;
mod told;

pub use error::SwitchError;
use image::Image;
pub use image::{IMAGE_DISK, ImageWish};
use sleeper::{Place, Ready, Sleeper};
pub use told::{KernelInfo, Newcomer, Next, Switched};

use crate::capture::MachineState;
use crate::clock::TimePolicy;
use crate::config::{Shape, parse_name};
use crate::disk::DiskCare;
use crate::kernel;
use crate::load;
use crate::machine::Machine;
use crate::restore::HostEnds;
use crate::save::Wish;
use crate::start;
use crate::virtio::SlotState;
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
}

/// What [`Kernels`] holds at every time that it can be asked.
const SOMEBODY: &str = "a kernel is awake";

/// Makes the host's ends that every kernel has in turn.
pub type Ends = Box<dyn Fn() -> HostEnds>;

/// The kernels of this process.
pub struct Kernels {
    kvm: Kvm,
    ends: Ends,
    /// None only while one takes the place of another.
    awake: Option<Awake>,
    asleep: Vec<Sleeper>,
}

impl Kernels {
    /// One kernel, awake.
    pub fn new(kvm: Kvm, machine: Machine, source: PathBuf, ends: Ends) -> Self {
        let name = machine.shape().name.clone();
        Self { kvm, ends, awake: Some(Awake { name, source, machine, image: None }), asleep: Vec::new() }
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
        });
        awake.chain(self.asleep.iter().map(Sleeper::info)).collect()
    }

    /// Drops one that sleeps; a file that it slept in stays.
    ///
    /// # Errors
    /// Nobody sleeps under this name, or an image kernel is shown it.
    pub fn forget(&mut self, name: &str) -> Result<(), SwitchError> {
        let index = self.find(name)?;
        if self.image().is_some_and(|image| image.of() == name) {
            return Err(SwitchError::Shown(name.to_owned()));
        }
        self.asleep.remove(index);
        Ok(())
    }

    /// Puts the awake kernel to sleep, in `file` if there is one, and has the other run. An image kernel doesn't sleep: once the
    /// other runs it is no more.
    ///
    /// # Errors
    /// See [`SwitchError`].
    pub fn switch(&mut self, next: &Next, file: Option<PathBuf>) -> Result<Switched, SwitchError> {
        if file.is_some() || matches!(next, Next::Boot(Newcomer { image: Some(_), .. })) {
            self.check_can_be_kept()?;
        }
        let ready = self.prepare(next)?;
        // Such disks can only be those of the one that falls asleep, whichever of the two had them first.
        let shared = ready.disks.iter().any(|disk| !disk.file.read_only);
        let started = Instant::now();
        let asleep = self.fall_asleep(file)?;
        let saved = if matches!(asleep.place, Place::File(_)) { started.elapsed() } else { Duration::ZERO };
        let switched = Switched {
            from: asleep.name.clone(),
            ended: asleep.image.is_some(),
            unfinished: asleep.image.as_ref().and_then(Image::unfinished),
            to: ready.name.clone(),
            pause: Duration::ZERO,
            saved,
        };
        let image = match next {
            Next::Boot(newcomer) => newcomer.image.as_ref(),
            Next::Wake(..) => None,
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

    /// Gives what an image kernel wrote its name, all of it checked, as it powers the machine off. `None` if it was given nothing
    /// to write to, or is none.
    ///
    /// # Errors
    /// It is no whole snapshot, or can't be named.
    pub fn finish_image(&mut self) -> Result<Option<PathBuf>, SwitchError> {
        let image = self.awake.as_mut().and_then(|awake| awake.image.take());
        image.map_or(Ok(None), Image::finish)
    }

    /// Whether the one that is awake is an image kernel.
    pub fn is_image_kernel(&self) -> bool {
        self.image().is_some()
    }

    /// Refuses to keep an image kernel, in a file or for another: what it is shown is no part of it.
    ///
    /// # Errors
    /// The one that is awake is one.
    pub fn check_can_be_kept(&self) -> Result<(), SwitchError> {
        match self.image() {
            Some(_) => Err(SwitchError::ImageKernel(self.origin().0.to_owned())),
            None => Ok(()),
        }
    }

    fn image(&self) -> Option<&Image> {
        self.awake.as_ref().and_then(|awake| awake.image.as_ref())
    }

    /// Restarts the machine from what an image kernel wrote: the restore stub checks it and puts its RAM in place. Whoever slept is that
    /// machine, and wakes up no more. Returns what the stub said.
    ///
    /// # Errors
    /// There is no image, or it is refused; then nobody is awake.
    pub fn restart(&mut self) -> Result<String, SwitchError> {
        let Awake { machine, image, .. } = self.awake.take().ok_or(SwitchError::Ending)?;
        machine.dismantle();
        let image = image.ok_or(SwitchError::NoImage)?;
        let index = self.find(image.of())?;
        let (snapshot, ram, report) = image.overlay(&self.kvm)?;
        let state = load::state(&snapshot)?;
        load::check_host(&self.kvm, &snapshot, &state)?;
        let sleeper = &self.asleep[index];
        let (name, disks, source) = (sleeper.name.clone(), sleeper.disks.clone(), snapshot.path().to_owned());
        let (time, generation) = (TimePolicy::Advance, Some(start::generation()?));
        self.run(Ready { name, source, state, ram, time, disks, generation }, None)?;
        self.asleep.remove(index);
        Ok(report.line)
    }

    /// All that can be refused while the awake kernel still runs.
    fn prepare(&self, next: &Next) -> Result<Ready, SwitchError> {
        match next {
            Next::Boot(newcomer) => self.prepare_boot(newcomer),
            Next::Wake(name, time) => self.asleep[self.find(name)?].ready(*time),
        }
    }

    fn prepare_boot(&self, newcomer: &Newcomer) -> Result<Ready, SwitchError> {
        let machine = self.awake();
        let disks: Vec<_> = machine
            .disks
            .iter()
            .filter(|disk| newcomer.share_disks || disk.file.read_only)
            .cloned()
            .collect();
        let has_disk = |slot: &SlotState| !slot.is_disk() || disks.iter().any(|disk| disk.id == slot.id);
        let devices: Vec<_> = machine.board().virtio().save();
        let image = newcomer.image.as_ref().is_some_and(|wish| wish.write_to.is_some());
        let devices = devices.iter().map(SlotState::after_reset).filter(has_disk);
        let devices = image.then(image::disk_slot).into_iter().chain(devices).collect();
        let shape = Shape {
            name: machine.shape().name.clone(),
            vcpus: newcomer.vcpus.unwrap_or(machine.shape().vcpus),
            memory: newcomer.memory.unwrap_or(machine.shape().memory),
            kernel: Default::default(),
        };
        let announced = newcomer
            .image
            .as_ref()
            .map(|_| image::announce(&newcomer.source, shape.memory, machine.shape().memory));
        let source = announced.as_ref().unwrap_or(&newcomer.source);
        let (state, ram) = start::prepare(&self.kvm, shape, devices, source)?;
        let name = self.name_for(newcomer, &state)?;
        let source = newcomer.source.kernel.clone();
        Ok(Ready { name, source, state, ram, time: TimePolicy::Freeze, disks, generation: None })
    }

    fn name_for(&self, newcomer: &Newcomer, state: &MachineState) -> Result<String, SwitchError> {
        let taken =
            |name: &str| self.origin().0 == name || self.asleep.iter().any(|sleeper| sleeper.name == name);
        if let Some(name) = &newcomer.name {
            let good = parse_name(name).is_ok() && !taken(name);
            return if good { Ok(name.clone()) } else { Err(SwitchError::BadName(name.clone())) };
        }
        let release = state.shape.kernel.version.as_deref().map_or("kernel", kernel::release);
        let base = release.chars().take(48).collect::<String>();
        let numbered = (2..).map(|number| format!("{base}-{number}"));
        let free = std::iter::once(base.clone()).chain(numbered).find(|name| !taken(name));
        Ok(free.unwrap_or(base))
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
        let Awake { name, source, machine, image } = self.awake.take().ok_or(SwitchError::Ending)?;
        let (ram, disks) = machine.dismantle();
        let place = kept.map_or(Place::Memory(ram), Place::File);
        Ok(Sleeper { name, source, state, place, disks, stamps: Vec::new(), since: Instant::now(), image })
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
        if asleep.image.is_none() {
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
        self.awake = Some(Awake { name: ready.name, source: ready.source, machine, image });
        Ok(())
    }
}
