//! Ground: what a machine stands on, and no state has a say in: KVM's VM, empty, and a thread for the first vCPU.
//!
//! In: KVM. Out: the same, for a machine's state and RAM to be put on it. Holds: KVM takes a third of a restore's time for an empty VM, so that
//! thread makes it, while others find out what the machine is.

use crate::kvm::Ioctl;
use crate::msr;
use crate::soon;
use crate::vcpu_thread::Seat;
use crate::vm::{self, OpenError};
use kvm_ioctls::{Kvm, VmFd};
use std::io;
use std::sync::mpsc::{Receiver, channel};

/// The thread that will be the first vCPU's.
const FIRST: u32 = 0;

/// An empty VM.
pub struct Ground {
    pub(crate) vm: VmFd,
    /// What this host's KVM has of model specific registers.
    pub(crate) msr_list: Vec<u32>,
    /// Of the first vCPU, if it is there.
    pub(crate) seat: Option<Seat>,
}

impl Ground {
    /// Made here and now.
    ///
    /// # Errors
    /// The failed call.
    pub fn new(kvm: &Kvm) -> Result<Self, Ioctl> {
        Ok(Self { vm: vm::empty(kvm)?, msr_list: msr::list(kvm)?, seat: None })
    }
}

/// Ground that is being made.
pub struct Ahead {
    made: Receiver<Result<Ground, OpenError>>,
    seat: Seat,
}

impl Ahead {
    /// Begins it, with a `/dev/kvm` of its own.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn begin() -> io::Result<Self> {
        let (sender, made) = channel();
        let make = move || {
            let ground = vm::open().and_then(|kvm| Ok(Ground::new(&kvm)?));
            // Nobody wants it any more if the snapshot was refused.
            let _ = sender.send(ground);
        };
        Ok(Self { made, seat: Seat::after(FIRST, make)? })
    }

    /// Waits for it.
    ///
    /// # Errors
    /// KVM refused.
    pub fn wait(self) -> Result<Ground, OpenError> {
        let ground = soon::recv(&self.made).expect("the thread sends before anything else");
        ground.map(|ground| Ground { seat: Some(self.seat), ..ground })
    }
}
