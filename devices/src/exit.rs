//! The exit port and the control port: a guest ends its VM with a status of its own choosing, or gives it to another kernel.
//!
//! In: a write. Out: [`Request::Exit`], [`Request::Return`], [`Request::Restart`]. Holds: nothing; reads are all ones, as where there
//! is no device.

use crate::{BusDevice, Request, Stateless};

/// Written to the control port: let the kernel that sleeps go on.
pub const RETURN: u8 = 1;
/// Written to the control port: restart the machine from the image on the disk that this kernel was given to write it.
pub const RESTART: u8 = 2;

/// Two ports. What is written to the first is the VM's exit status; a wider write counts by its lowest byte, since guests made
/// for QEMU's `isa-debug-exit` write 32 bits. The second, the control port, takes [`RETURN`] and [`RESTART`].
#[derive(Debug, Default)]
pub struct ExitPort;

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (0, [status, ..]) => Some(Request::Exit(*status)),
            (1, [RETURN]) => Some(Request::Return),
            (1, [RESTART]) => Some(Request::Restart),
            _ => None,
        }
    }
}

impl Stateless for ExitPort {}

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
    fn the_control_port_takes_two_words() {
        assert_eq!(ExitPort.write(1, &[RETURN]), Some(Request::Return));
        assert_eq!(ExitPort.write(1, &[RESTART]), Some(Request::Restart));
        assert_eq!(ExitPort.write(1, &[0]), None);
    }

    #[test]
    fn elsewhere_is_nothing() {
        assert_eq!(ExitPort.write(2, &[3]), None);
        assert_eq!(ExitPort.write(0, &[]), None);
        let mut data = [0; 4];
        ExitPort.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
