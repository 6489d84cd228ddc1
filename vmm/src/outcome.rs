//! How a VM ended, and the exit status that says so.
//!
//! In: a reason to stop, or a user's wish. Out: a status and a line of text. Holds: statuses below 16 are the monitor's;
//! the exit port's are the guest's own, whatever they are.

use crate::run_loop::Stop;
use devices::Request;
use std::fmt;

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// A triple fault: a reset as well, by a kernel that knows no other or by one that crashed. With a line for each vCPU
    /// that says where it stood.
    TripleFault(Vec<String>),
    /// The guest's kernel panicked.
    Panicked,
    /// The guest wrote this to the exit port.
    Exit(u8),
    /// The user ended it: escape key, `vmm stop`, or a snapshot that asked for it.
    Stopped,
    /// The guest gave the machine to another kernel, by the control port.
    GaveUp,
    /// A signal ended it.
    Signal(i32),
    /// The monitor or KVM failed.
    Fault(String),
}

impl Outcome {
    /// What a stop means, for a guest that did or did not report a panic on its console before.
    pub fn of(stop: Stop, panic_seen: bool) -> Self {
        match stop {
            Stop::Guest(Request::PowerOff) => Self::PoweredOff,
            Stop::Guest(Request::Exit(status)) => Self::Exit(status),
            Stop::Guest(Request::Panicked) => Self::Panicked,
            Stop::Guest(Request::Reset) | Stop::TripleFault if panic_seen => Self::Panicked,
            Stop::Guest(Request::Reset) => Self::Reset,
            Stop::Guest(Request::Return | Request::Restart) => Self::GaveUp,
            Stop::TripleFault => Self::TripleFault(Vec::new()),
            Stop::Fault(text) => Self::Fault(text),
        }
    }

    /// With where each vCPU stood, if that says anything of this end.
    pub fn at(self, places: impl FnOnce() -> Vec<String>) -> Self {
        match self {
            Self::TripleFault(_) => Self::TripleFault(places()),
            other => other,
        }
    }

    /// What to say instead, if the guest cannot have gone on because part of its RAM is lost. A vCPU that finds its page tables
    /// or its code gone ends with an error of KVM's or, where KVM walks the tables itself, with a triple fault.
    pub fn unless(self, lost: Option<&str>) -> Self {
        match (self, lost) {
            (Self::TripleFault(_) | Self::Fault(_), Some(why)) => Self::Fault(why.to_owned()),
            (other, _) => other,
        }
    }

    /// The process's exit status. 1 and 2 are the monitor's own failures and wrong usage.
    pub fn status(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Stopped => 0,
            Self::Fault(_) | Self::GaveUp => 1,
            Self::Panicked => 3,
            Self::Reset => 4,
            Self::TripleFault(_) => 5,
            Self::Exit(status) => *status,
            Self::Signal(signal) => 128 + *signal as u8,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::TripleFault(places) => {
                write!(f, "the guest asked for a reset by a triple fault, or crashed")?;
                places.iter().try_for_each(|place| write!(f, "\n{place}"))
            }
            Self::Panicked => write!(f, "the guest's kernel panicked"),
            Self::Exit(status) => write!(f, "the guest ended with status {status}"),
            Self::Stopped => write!(f, "stopped"),
            Self::GaveUp => write!(f, "the guest gave the machine to another kernel"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Fault(text) => write!(f, "the guest cannot go on: {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let reset = Stop::Guest(Request::Reset);
        assert_eq!(Outcome::of(reset.clone(), false), Outcome::Reset);
        assert_eq!(Outcome::of(reset, true), Outcome::Panicked);
        assert_eq!(Outcome::of(Stop::TripleFault, true), Outcome::Panicked);
        assert_eq!(Outcome::of(Stop::Guest(Request::PowerOff), true), Outcome::PoweredOff);
    }

    #[test]
    fn a_triple_fault_is_told_with_its_places() {
        let places = || vec!["vCPU 0: here".to_owned(), "vCPU 1: there".to_owned()];
        let text = Outcome::of(Stop::TripleFault, false).at(places).to_string();
        assert!(text.ends_with("crashed\nvCPU 0: here\nvCPU 1: there"), "{text}");
        assert_eq!(Outcome::Reset.at(places), Outcome::Reset);
    }

    #[test]
    fn lost_ram_is_the_reason_for_a_fault() {
        let fault = || Outcome::of(Stop::TripleFault, false);
        assert_eq!(fault().unless(Some("why")), Outcome::Fault("why".to_owned()));
        assert_eq!(fault().unless(None), fault());
        assert_eq!(Outcome::PoweredOff.unless(Some("why")), Outcome::PoweredOff);
    }

    #[test]
    fn the_guest_chooses_its_status() {
        assert_eq!(Outcome::of(Stop::Guest(Request::Exit(42)), true).status(), 42);
    }
}
