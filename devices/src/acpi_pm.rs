//! The power-management registers of hardware-reduced ACPI.
//!
//! In: writes to three byte registers. Out: [`Request::PowerOff`] and [`Request::Reset`]. Holds: the FADT and `\_S5`
//! give the guest the same values that are compared here.
//!
//! Source: ACPI 6.5, 4.8.3.6 (reset register) and 4.8.3.7 (sleep control and sleep status registers).

use crate::{BusDevice, Request, Stateless};

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;

/// `SLP_TYPx`, three bits of the sleep control register.
const SLEEP_TYPE: u8 = 0b111 << 2;
/// `SLP_EN`: go to sleep now. Always reads as zero.
const SLEEP_ENABLE: u8 = 1 << 5;

/// `SLP_TYPx` of soft off, as `\_S5` says it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What resets the machine when written to the reset register, as the FADT says it.
pub const RESET_VALUE: u8 = 1;

/// Sleep control, sleep status and reset register, a byte each.
///
/// All read as zero. The machine never sleeps, so the status register's wake bit is never set; what is written without
/// `SLP_EN` has no effect and is not kept.
#[derive(Debug, Default)]
pub struct AcpiPm;

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (SLEEP_CONTROL | SLEEP_STATUS | RESET, [byte]) = (offset, data) {
            *byte = 0;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (SLEEP_CONTROL, [value]) => sleep(*value),
            (RESET, [RESET_VALUE]) => Some(Request::Reset),
            _ => None,
        }
    }
}

fn sleep(control: u8) -> Option<Request> {
    let soft_off = SLEEP_TYPE_S5 << 2;
    (control & SLEEP_ENABLE != 0 && control & SLEEP_TYPE == soft_off).then_some(Request::PowerOff)
}

impl Stateless for AcpiPm {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_powers_off() {
        // The byte Linux writes for S5: acpi_hw_extended_sleep.
        assert_eq!(AcpiPm.write(SLEEP_CONTROL, &[0x34]), Some(Request::PowerOff));
    }

    #[test]
    fn another_state_or_no_enable_does_nothing() {
        for sleep_type in (0..8).filter(|t| *t != SLEEP_TYPE_S5) {
            assert_eq!(AcpiPm.write(SLEEP_CONTROL, &[sleep_type << 2 | SLEEP_ENABLE]), None);
        }
        assert_eq!(AcpiPm.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2]), None);
    }

    #[test]
    fn the_reset_value_resets() {
        assert_eq!(AcpiPm.write(RESET, &[RESET_VALUE]), Some(Request::Reset));
        assert_eq!(AcpiPm.write(RESET, &[0]), None);
        assert_eq!(AcpiPm.write(SLEEP_STATUS, &[0x80]), None);
    }

    #[test]
    fn registers_are_bytes() {
        assert_eq!(AcpiPm.write(SLEEP_CONTROL, &[0x34, 0]), None);
        let mut wide = [0; 2];
        AcpiPm.read(SLEEP_CONTROL, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        let mut byte = [0xaa];
        AcpiPm.read(SLEEP_STATUS, &mut byte);
        assert_eq!(byte, [0]);
    }
}
