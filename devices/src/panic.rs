//! pvpanic: a guest kernel says that it has panicked.
//!
//! In: a write of event bits. Out: [`Request::Panicked`]. Holds: only what is advertised is acted upon.
//!
//! Source: QEMU, `docs/specs/pvpanic`. The guest's driver reads which events the device knows, and tells only those. We
//! know the panic alone: a kernel with a crash kernel loaded then says nothing and is left to boot that.

use crate::{BusDevice, Request, Stateless};

/// The guest has panicked and handles it no further.
const PANICKED: u8 = 1 << 0;

/// The event port of pvpanic, one byte.
#[derive(Debug, Default)]
pub struct PanicDevice;

impl BusDevice for PanicDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, [events]) = (offset, data) {
            *events = PANICKED;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (0, [events]) if events & PANICKED != 0 => Some(Request::Panicked),
            _ => None,
        }
    }
}

impl Stateless for PanicDevice {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_advertises_the_panic_and_takes_it() {
        let mut events = [0];
        PanicDevice.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        assert_eq!(PanicDevice.write(0, &[PANICKED]), Some(Request::Panicked));
        assert_eq!(PanicDevice.write(0, &[0xff]), Some(Request::Panicked));
    }

    #[test]
    fn other_events_are_ignored() {
        let (crash_loaded, shutdown) = (1 << 1, 1 << 2);
        for events in [0, crash_loaded, shutdown] {
            assert_eq!(PanicDevice.write(0, &[events]), None);
        }
    }

    #[test]
    fn elsewhere_is_nothing() {
        let mut data = [0; 2];
        PanicDevice.read(0, &mut data);
        assert_eq!(data, [0xff; 2]);
        assert_eq!(PanicDevice.write(1, &[PANICKED]), None);
        assert_eq!(PanicDevice.write(0, &[PANICKED, 0]), None);
    }
}
