//! Guest time: kvmclock and the TSC, which tell the same time and must go on telling it together.
//!
//! In: a VM whose vCPUs stand still, a saved [`ClockState`], a [`TimePolicy`]. Out: one instant as both clocks have it. Holds:
//! kvmclock alone is set by a policy; every TSC is set from how far kvmclock has moved since it was saved, so the two
//! stay as far apart as they were, and all TSCs stay equal. A guest's clock watchdog, which compares them, has nothing to see.
//!
//! Source: Linux, Documentation/virt/kvm/devices/vcpu.rst, 4.1 (`KVM_VCPU_TSC_OFFSET`), which describes this for migration.

use crate::kvm::{self, During, Ioctl};
use crate::msr;
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// What guest time does about the time that a machine spent in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimePolicy {
    /// It has passed for the guest as well: all its clocks move on by it.
    Advance,
    /// It has not been: all its clocks go on from where they were.
    Freeze,
    /// Its monotonic clock goes on from where it was; the wall clock is for someone in the guest to set: the agent, or
    /// whoever asks the RTC, which tells the host's time whatever the policy. To KVM this is [`TimePolicy::Freeze`].
    Step,
}

/// Guest time at one instant, and what the host's clock said then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in nanoseconds.
    pub clock: u64,
    /// The host's CLOCK_REALTIME, in nanoseconds since 1970.
    pub realtime: u64,
}

/// One instant, for all vCPUs of a capture or a restore.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// What kvmclock and the host's clock said.
    pub clock: ClockState,
    /// What the host's TSC said, as the guest's frequency scales it: guest TSC = this + offset. `None` where KVM has no
    /// offsets.
    host_tsc: Option<u64>,
}

/// A look at the clocks may be interrupted by whatever the host has to do. The most exact of so many counts.
const LOOKS: usize = 3;

impl Moment {
    /// Reads the clocks by way of any vCPU, after the frequency of its TSC was set.
    ///
    /// # Errors
    /// The failed call.
    pub fn read(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, Ioctl> {
        let mut best = Look::at(vm, vcpu)?;
        for _ in 1..LOOKS {
            if best.error == 0 {
                break;
            }
            let other = Look::at(vm, vcpu)?;
            best = if other.error < best.error { other } else { best };
        }
        Ok(best.moment)
    }

    /// The same where all TSCs count as the host's does, in one call: KVM says of which host TSC kvmclock's reading is. `None` where it doesn't
    /// (its master clock does not run). A KVM that does has offsets: both came with Linux 5.16.
    ///
    /// # Errors
    /// The failed call.
    pub fn of_unscaled(vm: &VmFd) -> Result<Option<Self>, Ioctl> {
        let now = vm.get_clock().during("KVM_GET_CLOCK")?;
        let clock = ClockState { clock: now.clock, realtime: realtime(&now) };
        let told = now.flags & KVM_CLOCK_HOST_TSC != 0;
        Ok(told.then_some(Self { clock, host_tsc: Some(now.host_tsc) }))
    }

    /// The vCPU's TSC at this moment; `None` where KVM has no offsets.
    pub fn tsc(&self, vcpu: &VcpuFd) -> Option<u64> {
        Some(self.host_tsc?.wrapping_add(kvm::tsc_offset(vcpu)?))
    }

    /// The offset with which a vCPU's TSC says `tsc` at this moment; `None` where KVM has no offsets.
    pub fn tsc_offset(&self, tsc: u64) -> Option<u64> {
        Some(tsc.wrapping_sub(self.host_tsc?))
    }

    /// Nanoseconds of guest time since it was `saved`. Guest time never goes back.
    pub fn since(&self, saved: &ClockState) -> u64 {
        self.clock.clock.saturating_sub(saved.clock)
    }
}

/// One reading of the clocks.
struct Look {
    moment: Moment,
    /// By how many nanoseconds kvmclock and TSC may be of different instants.
    error: u64,
}

impl Look {
    /// Reads a TSC between two readings of kvmclock.
    fn at(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, Ioctl> {
        let offset = kvm::tsc_offset(vcpu);
        let before = vm.get_clock().during("KVM_GET_CLOCK")?;
        let realtime = realtime(&before);
        let tsc = msr::save(vcpu, &[msr::TSC])?.get(msr::TSC);
        let after = vm.get_clock().during("KVM_GET_CLOCK")?;
        let host_tsc = tsc.zip(offset).map(|(tsc, offset)| tsc.wrapping_sub(offset));
        Ok(Self::of(host_tsc, realtime, &before, &after))
    }

    /// KVM says of which host TSC kvmclock's reading is. If the scaled one lies between two of those, there is no scaling, and
    /// the reading is exact. A guest's clock watchdog is content with no less where the host is busy: Linux 7.2 allows 500 ppm
    /// of half a second. Elsewhere the TSC is taken to be of the time in the middle.
    fn of(host_tsc: Option<u64>, realtime: u64, before: &kvm_clock_data, after: &kvm_clock_data) -> Self {
        let told = before.flags & after.flags & KVM_CLOCK_HOST_TSC != 0;
        let unscaled = host_tsc.is_some_and(|tsc| (before.host_tsc..=after.host_tsc).contains(&tsc));
        let took = after.clock.saturating_sub(before.clock);
        let (error, host_tsc) =
            if told && unscaled { (0, Some(before.host_tsc)) } else { (took / 2, host_tsc) };
        let clock = before.clock.saturating_add(error);
        let clock = ClockState { clock, realtime: realtime.saturating_add(error) };
        Self { moment: Moment { clock, host_tsc }, error }
    }
}

/// The host's clock at the instant of a reading. KVM gives it where its master clock runs; elsewhere it is read now.
fn realtime(reading: &kvm_clock_data) -> u64 {
    if reading.flags & KVM_CLOCK_REALTIME != 0 {
        return reading.realtime;
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Sets kvmclock, before the vCPUs' TSCs. Where it has to advance, KVM adds what the host's clock has moved since, and nothing
/// if that was set back (`KVM_CLOCK_REALTIME`, Documentation/virt/kvm/api.rst 4.30; Linux 5.16).
///
/// # Errors
/// The failed call.
pub fn set(vm: &VmFd, saved: &ClockState, policy: TimePolicy) -> Result<(), Ioctl> {
    let flags = if policy == TimePolicy::Advance { KVM_CLOCK_REALTIME } else { 0 };
    let ClockState { clock, realtime } = *saved;
    vm.set_clock(&kvm_clock_data { clock, flags, realtime, ..Default::default() }).during("KVM_SET_CLOCK")
}

/// A TSC of so many kHz, so many nanoseconds after it said `tsc`.
pub fn tsc_after(tsc: u64, khz: u32, nanoseconds: u64) -> u64 {
    let ticks = u128::from(nanoseconds) * u128::from(khz) / 1_000_000;
    tsc.wrapping_add(ticks as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm;

    #[test]
    fn a_day_of_ticks() {
        assert_eq!(tsc_after(5, 2_600_000, 86_400_000_000_000), 5 + 86_400 * 2_600_000_000);
        assert_eq!(tsc_after(u64::MAX, 1_000_000, 3), 2, "a TSC wraps");
        assert_eq!(tsc_after(7, u32::MAX, 0), 7);
    }

    fn reading(clock: u64, flags: u32, host_tsc: u64) -> kvm_clock_data {
        kvm_clock_data { clock, flags, host_tsc, ..Default::default() }
    }

    #[test]
    fn a_reading_is_exact_where_kvm_tells_the_hosts_tsc() {
        let (before, after) =
            (reading(100, KVM_CLOCK_HOST_TSC, 5000), reading(140, KVM_CLOCK_HOST_TSC, 5100));
        let look = Look::of(Some(5080), 7, &before, &after);
        assert_eq!((look.error, look.moment.host_tsc), (0, Some(5000)));
        assert_eq!(look.moment.clock, ClockState { clock: 100, realtime: 7 });
    }

    #[test]
    fn elsewhere_the_tsc_is_of_the_time_in_the_middle() {
        let (before, after) =
            (reading(100, KVM_CLOCK_HOST_TSC, 5000), reading(140, KVM_CLOCK_HOST_TSC, 5100));
        let (mute, scaled) = (reading(140, 0, 5100), Some(9999));
        for look in [Look::of(scaled, 7, &before, &after), Look::of(scaled, 7, &before, &mute)] {
            assert_eq!((look.error, look.moment.host_tsc), (20, scaled));
            assert_eq!(look.moment.clock, ClockState { clock: 120, realtime: 27 });
        }
    }

    #[test]
    fn one_reading_of_the_vms_clock_is_as_good_as_a_look_at_a_vcpu() {
        let vm = vm::create(&vm::open().unwrap(), None).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // KVM's master clock does not run before.
        set(&vm, &ClockState::default(), TimePolicy::Freeze).unwrap();
        let told = vm.get_clock().unwrap().flags & KVM_CLOCK_HOST_TSC != 0;
        let before = Moment::read(&vm, &vcpu).unwrap();
        let now = Moment::of_unscaled(&vm).unwrap();
        let after = Moment::read(&vm, &vcpu).unwrap();
        assert_eq!(now.is_some(), told);
        let clock =
            std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        assert!(told || clock.unwrap().trim() != "tsc");
        assert!(now.is_none_or(|now| (before.host_tsc..=after.host_tsc).contains(&now.host_tsc)));
        assert!(now.is_none_or(|now| (before.clock.clock..=after.clock.clock).contains(&now.clock.clock)));
        assert!(kvm::tsc_khz(&vm).is_none_or(|khz| khz == vcpu.get_tsc_khz().unwrap()));
    }

    #[test]
    fn guest_time_never_goes_back() {
        let at = |clock| ClockState { clock, realtime: 0 };
        let now = Moment { clock: at(10), host_tsc: None };
        assert_eq!((now.since(&at(4)), now.since(&at(11))), (6, 0));
    }

    #[test]
    fn an_offset_leads_from_the_hosts_tsc_to_the_guests() {
        let now = Moment { clock: ClockState::default(), host_tsc: Some(1000) };
        assert_eq!(now.tsc_offset(10), Some(10u64.wrapping_sub(1000)));
        assert_eq!(Moment { host_tsc: None, ..now }.tsc_offset(10), None);
    }
}
