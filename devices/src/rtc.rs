//! The PC's clock, an MC146818 with a century byte: it tells the host's time of day at the moment of the read.
//!
//! In: register numbers and bytes from the guest, the host's time. Out: the time of day in UTC. Holds: nothing ticks here;
//! what the guest sets is kept as an offset to the host's time, so the clock goes on while the machine lies in a file.
//!
//! Source: Motorola MC146818A data sheet; its divider, update cycle and formats. It has no interrupt line here: alarms and
//! periodic interrupts can't be turned on, and their enable bits read as zero.

use crate::{BusDevice, Persist, Request};
use jiff::SignedDuration;
use jiff::civil::DateTime;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use thiserror::Error;

const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;
/// Bytes of registers and battery-backed memory; the index port's top bit masks NMIs on a PC and is no part of the index.
const CELLS: usize = 128;

const SECONDS: usize = 0;
const MINUTES: usize = 2;
const HOURS: usize = 4;
const DAY_OF_WEEK: usize = 6;
const DAY_OF_MONTH: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REGISTER_A: usize = 10;
const REGISTER_B: usize = 11;
const REGISTER_C: usize = 12;
const REGISTER_D: usize = 13;
/// Where the FADT says that the century is.
pub const RTC_CENTURY: u8 = 0x32;
const CENTURY: usize = RTC_CENTURY as usize;

/// Register A: an update is near. What is read while it is clear stays true for [`UPDATE_NOTICE`] at least.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A: the divider that makes seconds of the oscillator's pulses.
const DIVIDER: u8 = 0b111 << 4;
const DIVIDER_RUNS: u8 = 0b010 << 4;
/// Both settings with these bits hold the divider in reset.
const DIVIDER_RESET: u8 = 0b110 << 4;
/// Register B: updates are held back while the guest sets the time.
const SET: u8 = 1 << 7;
/// Register B: periodic, alarm and update-ended interrupts.
const INTERRUPTS: u8 = 0b111 << 4;
/// Register B: binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Register B: hours from 0 to 23.
const HOURS_24: u8 = 1 << 1;
/// Hours register: afternoon, where hours go from 1 to 12.
const PM: u8 = 1 << 7;
/// Register D: memory and time are valid.
const VALID: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// From UIP to the update, in nanoseconds.
const UPDATE_NOTICE: i128 = 244_000;
/// The first update comes half a second after the divider leaves reset.
const AFTER_RESET: i128 = SECOND / 2;
const EPOCH: DateTime = DateTime::constant(1970, 1, 1, 0, 0, 0, 0);
/// The years 0 to 9999, which two digits of century and two of year can tell, in nanoseconds since 1970.
const FIRST: i128 = -62_167_219_200 * SECOND;
const LAST: i128 = 253_402_300_799 * SECOND;

/// What survives of the clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that the data port leads to.
    pub index: u8,
    /// All registers and the memory after them, 128 bytes. Those of the time count only while the clock is stopped.
    pub cells: Vec<u8>,
    /// The clock's time less the host's, in nanoseconds.
    pub offset: i128,
}

/// A clock that runs in UTC with the host's: BCD, 24 hours.
impl Default for RtcState {
    fn default() -> Self {
        let mut cells = vec![0; CELLS];
        cells[REGISTER_A] = DIVIDER_RUNS | 0b0110;
        cells[REGISTER_B] = HOURS_24;
        cells[REGISTER_D] = VALID;
        Self { index: 0, cells, offset: 0 }
    }
}

/// A state that no clock could have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RtcStateError {
    /// Another number of registers.
    #[error("{0} bytes of registers and memory; expected 128")]
    Cells(usize),
    /// No such register, or bits in one that always read as zero or one.
    #[error("register {register:#x} holds {value:#x}, which it can't")]
    Register {
        /// Which; the index itself counts as none and is given as 0x80.
        register: usize,
        /// What it holds.
        value: u8,
    },
    /// Further from the host's time than the calendar goes.
    #[error("{0} ns from the host's time, which is past the years 0 to 9999")]
    Offset(i128),
}

/// Tells the host's time of day: how long ago 1970 began, in UTC.
pub type HostTime = Box<dyn Fn() -> Duration + Send>;

/// The clock.
pub struct Rtc {
    state: RtcState,
    host: HostTime,
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA_PORT, [byte]) = (offset, data) {
            *byte = self.register(self.state.index.into());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (INDEX_PORT, [index]) => self.state.index = index & (CELLS - 1) as u8,
            (DATA_PORT, [value]) => self.set_register(self.state.index.into(), *value),
            _ => {}
        }
        None
    }
}

impl Rtc {
    fn register(&self, register: usize) -> u8 {
        match register {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY_OF_MONTH | MONTH | YEAR | CENTURY
                if self.runs() =>
            {
                time_cell(&civil(self.now()), register, self.state.cells[REGISTER_B])
            }
            REGISTER_A if self.runs() && self.now().rem_euclid(SECOND) >= SECOND - UPDATE_NOTICE => {
                self.state.cells[REGISTER_A] | UPDATE_IN_PROGRESS
            }
            _ => self.state.cells[register],
        }
    }

    fn set_register(&mut self, register: usize, value: u8) {
        match register {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY_OF_MONTH | MONTH | YEAR | CENTURY | REGISTER_A
            | REGISTER_B => self.set_time_or_mode(register, value),
            REGISTER_C | REGISTER_D => {}
            _ => self.state.cells[register] = value,
        }
    }

    /// A clock that stops has its time in its registers; one that starts takes it from there. Setting the time of a running
    /// clock is both. How far the second had got is kept, unless the divider was reset.
    fn set_time_or_mode(&mut self, register: usize, value: u8) {
        let (host, ran) = (self.host_now(), self.runs());
        let now = self.at(host);
        let phase = if self.divider_is_reset() { AFTER_RESET } else { now.rem_euclid(SECOND) };
        if ran {
            self.hold(now);
        }
        self.state.cells[register] = match register {
            REGISTER_A => value & !UPDATE_IN_PROGRESS,
            REGISTER_B => value & !INTERRUPTS,
            _ => value,
        };
        let set = register != REGISTER_A && register != REGISTER_B;
        if self.runs() && (set || !ran) {
            self.go_on(phase, host);
        }
    }

    fn runs(&self) -> bool {
        self.state.cells[REGISTER_B] & SET == 0 && self.state.cells[REGISTER_A] & DIVIDER == DIVIDER_RUNS
    }

    fn divider_is_reset(&self) -> bool {
        self.state.cells[REGISTER_A] & DIVIDER_RESET == DIVIDER_RESET
    }

    fn hold(&mut self, now: i128) {
        let now = civil(now);
        for register in [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY] {
            self.state.cells[register] = time_cell(&now, register, self.state.cells[REGISTER_B]);
        }
    }

    /// Goes on from the registers. If they hold no date, the time is what it would be, had nobody touched them.
    fn go_on(&mut self, phase: i128, host: i128) {
        if let Some(time) = decode(&self.state.cells) {
            let set = i128::from(time.duration_since(EPOCH).as_secs()) * SECOND + phase;
            self.state.offset = set - host;
        }
    }

    fn now(&self) -> i128 {
        self.at(self.host_now())
    }

    /// The clock's time when the host's is `host`.
    fn at(&self, host: i128) -> i128 {
        (host + self.state.offset).clamp(FIRST, LAST)
    }

    fn host_now(&self) -> i128 {
        i128::try_from((self.host)().as_nanos()).unwrap_or(LAST).min(LAST)
    }
}

/// The date and time so many nanoseconds since 1970, which are between [`FIRST`] and [`LAST`].
fn civil(time: i128) -> DateTime {
    EPOCH.saturating_add(SignedDuration::from_secs(time.div_euclid(SECOND) as i64))
}

/// What a register of the time holds at `time`, in the format that register B says.
fn time_cell(time: &DateTime, register: usize, format: u8) -> u8 {
    let value = match register {
        SECONDS => time.second(),
        MINUTES => time.minute(),
        HOURS => return hours_cell(time.hour() as u8, format),
        DAY_OF_WEEK => time.weekday().to_sunday_one_offset(),
        DAY_OF_MONTH => time.day(),
        MONTH => time.month(),
        YEAR => (time.year() % 100) as i8,
        _ => (time.year() / 100) as i8,
    };
    encode(value as u8, format)
}

fn hours_cell(hour: u8, format: u8) -> u8 {
    if format & HOURS_24 != 0 {
        return encode(hour, format);
    }
    let afternoon = if hour >= 12 { PM } else { 0 };
    encode((hour + 11) % 12 + 1, format) | afternoon
}

/// The hour from 0 to 23, if it is one.
fn hour(cell: u8, format: u8) -> Option<i8> {
    if format & HOURS_24 != 0 {
        return value(cell, format);
    }
    let hour = value(cell & !PM, format).filter(|hour| (1..=12).contains(hour))?;
    Some(hour % 12 + if cell & PM == 0 { 0 } else { 12 })
}

fn encode(value: u8, format: u8) -> u8 {
    if format & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
}

/// A number from 0 to 99, if it is one.
fn value(cell: u8, format: u8) -> Option<i8> {
    let (tens, ones) = if format & BINARY != 0 { (cell / 10, cell % 10) } else { (cell >> 4, cell & 15) };
    (tens < 10 && ones < 10).then_some((tens * 10 + ones) as i8)
}

/// The date and time in the registers, if it is one. The day of the week follows from the date.
fn decode(cells: &[u8]) -> Option<DateTime> {
    let format = cells[REGISTER_B];
    let number = |register: usize| value(cells[register], format);
    let year = i16::from(number(CENTURY)?) * 100 + i16::from(number(YEAR)?);
    let hour = hour(cells[HOURS], format)?;
    let (month, day) = (number(MONTH)?, number(DAY_OF_MONTH)?);
    DateTime::new(year, month, day, hour, number(MINUTES)?, number(SECONDS)?, 0).ok()
}

impl Persist for Rtc {
    type State = RtcState;
    type Host = HostTime;
    type Error = RtcStateError;

    fn save(&self) -> RtcState {
        self.state.clone()
    }

    fn from_state(state: &RtcState, host: HostTime) -> Result<Self, RtcStateError> {
        if state.cells.len() != CELLS {
            return Err(RtcStateError::Cells(state.cells.len()));
        }
        let never = [
            (REGISTER_A, UPDATE_IN_PROGRESS, 0),
            (REGISTER_B, INTERRUPTS, 0),
            (REGISTER_C, 0xff, 0),
            (REGISTER_D, 0xff, VALID),
        ];
        for (register, bits, held) in never {
            let value = state.cells[register];
            if value & bits != held {
                return Err(RtcStateError::Register { register, value });
            }
        }
        if usize::from(state.index) >= CELLS {
            return Err(RtcStateError::Register { register: CELLS, value: state.index });
        }
        if state.offset.unsigned_abs() > (LAST - FIRST) as u128 {
            return Err(RtcStateError::Offset(state.offset));
        }
        Ok(Self { state: state.clone(), host })
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
