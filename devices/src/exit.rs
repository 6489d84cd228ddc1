//! The exit port: a guest ends its VM with a status of its own choosing.
//!
//! In: a write. Out: [`Request::Exit`]. Holds: nothing; reads are all ones, as where there is no device.

use crate::{BusDevice, Persist, Request};
use std::convert::Infallible;

/// One port; what is written to it is the VM's exit status. A wider write counts by its lowest byte, since guests made
/// for QEMU's `isa-debug-exit` write 32 bits.
#[derive(Debug, Default)]
pub struct ExitPort;

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (0, [status, ..]) => Some(Request::Exit(*status)),
            _ => None,
        }
    }
}

impl Persist for ExitPort {
    type State = ();
    type Host = ();
    type Error = Infallible;

    fn save(&self) {}

    fn from_state((): &(), (): ()) -> Result<Self, Infallible> {
        Ok(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_the_status() {
        assert_eq!(ExitPort.write(0, &[0]), Some(Request::Exit(0)));
        assert_eq!(ExitPort.write(0, &[255]), Some(Request::Exit(255)));
    }

    #[test]
    fn a_wide_write_counts_by_its_lowest_byte() {
        assert_eq!(ExitPort.write(0, &0x0102_0307_u32.to_le_bytes()), Some(Request::Exit(7)));
    }

    #[test]
    fn elsewhere_is_nothing() {
        assert_eq!(ExitPort.write(1, &[3]), None);
        assert_eq!(ExitPort.write(0, &[]), None);
        let mut data = [0; 4];
        ExitPort.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
