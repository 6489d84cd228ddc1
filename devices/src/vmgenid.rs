//! VMGenID: tells a guest that it is not the only one that goes on from where it was.
//!
//! In: a new generation id, whenever a machine that was kept goes on. Out: its 16 bytes in guest memory, and one interrupt.
//! Holds: the bytes are there before the interrupt is, and the guest's memory is the only place that keeps them.
//!
//! A guest's first id is in its memory before it boots, as its ACPI tables are.
//!
//! Source: Microsoft, "Virtual Machine Generation ID": the id lies in memory that the guest's kernel doesn't use, where the
//! ACPI object `ADDR` says, and a change is followed by `Notify(.., 0x80)`, here from an ACPI generic event device.

use crate::{Interrupt, Persist};
use std::convert::Infallible;
use std::io;

/// Bytes of a generation id.
pub const GENERATION_LEN: usize = 16;
/// A generation id: random, so that no two of them are equal.
pub type Generation = [u8; GENERATION_LEN];

/// Puts an id where the guest finds it.
pub type Publish = Box<dyn Fn(&Generation) -> io::Result<()> + Send>;

/// The device's ends in the host.
pub struct GenerationHost {
    /// Puts an id into the guest's memory.
    pub publish: Publish,
    /// The generic event device's line.
    pub irq: Box<dyn Interrupt>,
}

/// The device. It has no registers.
pub struct VmGenId {
    host: GenerationHost,
}

impl VmGenId {
    /// Gives the guest another id and tells it so. No vCPU may have run since the machine was put back: what a guest makes of
    /// its random numbers before it hears of this, its twins make as well.
    ///
    /// # Errors
    /// The guest's memory can't be written, or the interrupt not raised.
    pub fn renew(&self, id: &Generation) -> io::Result<()> {
        (self.host.publish)(id)?;
        self.host.irq.trigger()
    }
}

/// The id is part of the guest's memory, and is saved with that.
impl Persist for VmGenId {
    type State = ();
    type Host = GenerationHost;
    type Error = Infallible;

    fn save(&self) {}

    fn from_state((): &(), host: GenerationHost) -> Result<Self, Infallible> {
        Ok(Self { host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Debug, PartialEq)]
    enum Seen {
        Bytes(Generation),
        Edge,
    }

    struct Line(Arc<Mutex<Vec<Seen>>>);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.lock().unwrap().push(Seen::Edge);
            Ok(())
        }
    }

    fn device(memory: io::Result<()>) -> (VmGenId, Arc<Mutex<Vec<Seen>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, irq) = (seen.clone(), Box::new(Line(seen.clone())));
        let publish = Box::new(move |id: &Generation| {
            log.lock().unwrap().push(Seen::Bytes(*id));
            memory.as_ref().map_or_else(|error| Err(error.kind().into()), |()| Ok(()))
        });
        (VmGenId::from_state(&(), GenerationHost { publish, irq }).unwrap(), seen)
    }

    #[test]
    fn the_bytes_come_before_the_interrupt() {
        let (device, seen) = device(Ok(()));
        device.renew(&[7; 16]).unwrap();
        assert_eq!(*seen.lock().unwrap(), [Seen::Bytes([7; 16]), Seen::Edge]);
    }

    #[test]
    fn an_id_that_is_not_there_is_not_announced() {
        let (device, seen) = device(Err(io::ErrorKind::NotFound.into()));
        assert!(device.renew(&[2; 16]).is_err());
        assert_eq!(*seen.lock().unwrap(), [Seen::Bytes([2; 16])]);
    }
}
