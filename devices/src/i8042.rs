//! An i8042 that is there for its reset line only.
//!
//! In: a command byte. Out: [`Request::Reset`]. Holds: no guest waits for it.
//!
//! The status register always says "output full, input empty". A driver that probes the ports flushes the output, finds
//! that it never empties and gives up within a millisecond (Linux `i8042_flush`: 16 reads); one that wants to reset the
//! machine waits for an empty input and finds it so (Linux `kb_wait`). All zeroes would cost a probe its command
//! time-outs, half a second each; all ones would cost a reset `kb_wait`'s time-out.

use crate::{BusDevice, Request, Stateless};

/// Data port, 0x60.
const DATA: u64 = 0;
/// Command port when written, status port when read: 0x64.
const COMMAND: u64 = 4;

/// Status: the output buffer is full; the input buffer (bit 1) is empty.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Command: pulse the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The controller's five ports, of which two are its own.
#[derive(Debug, Default)]
pub struct I8042;

impl I8042 {
    /// Ports from the data port to the command port.
    pub const LEN: u64 = COMMAND + 1;
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data) {
            (DATA, [byte]) => *byte = 0,
            (COMMAND, [byte]) => *byte = STATUS_OUTPUT_FULL,
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (COMMAND, [PULSE_RESET]) => Some(Request::Reset),
            _ => None,
        }
    }
}

impl Stateless for I8042 {}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(offset: u64) -> u8 {
        let mut byte = [0xaa];
        I8042.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn the_reset_command_resets_and_nothing_else_does() {
        assert_eq!(I8042.write(COMMAND, &[PULSE_RESET]), Some(Request::Reset));
        assert_eq!(I8042.write(COMMAND, &[0x20]), None);
        assert_eq!(I8042.write(DATA, &[PULSE_RESET]), None);
        assert_eq!(I8042.write(COMMAND, &[PULSE_RESET, 0]), None);
    }

    #[test]
    fn a_probe_gives_up_and_a_reset_does_not_wait() {
        let (output_full, input_full) = (1 << 0, 1 << 1);
        assert_eq!(read(COMMAND) & output_full, output_full);
        assert_eq!(read(DATA), 0);
        assert_eq!(read(COMMAND) & output_full, output_full, "reading data must not empty the output");
        assert_eq!(read(COMMAND) & input_full, 0);
    }

    #[test]
    fn the_ports_between_are_nobodys() {
        for offset in 1..COMMAND {
            assert_eq!(read(offset), 0xff);
        }
    }
}
