//! The clock as a guest's driver uses it, with a host whose time the test sets.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// 2026-11-21, a Saturday, 14:05:09 UTC, in nanoseconds since 1970.
const SATURDAY: u64 = 1_795_269_909 * 1_000_000_000;
const MS: u64 = 1_000_000;

struct Driver {
    rtc: Rtc,
    host: Arc<AtomicU64>,
}

impl Driver {
    fn new() -> Self {
        Self::with(&RtcState::default(), SATURDAY)
    }

    fn with(state: &RtcState, now: u64) -> Self {
        let host = Arc::new(AtomicU64::new(now));
        let told = host.clone();
        let time = Box::new(move || Duration::from_nanos(told.load(Ordering::SeqCst)));
        Self { rtc: Rtc::from_state(state, time).unwrap(), host }
    }

    fn get(&mut self, register: usize) -> u8 {
        let mut byte = [0];
        self.rtc.write(INDEX_PORT, &[register as u8]);
        self.rtc.read(DATA_PORT, &mut byte);
        byte[0]
    }

    fn set(&mut self, register: usize, value: u8) {
        assert_eq!(self.rtc.write(INDEX_PORT, &[register as u8]), None);
        assert_eq!(self.rtc.write(DATA_PORT, &[value]), None);
    }

    fn pass(&self, nanoseconds: u64) {
        self.host.fetch_add(nanoseconds, Ordering::SeqCst);
    }

    /// Century, year, month, day, hours, minutes, seconds, as the registers have them.
    fn time(&mut self) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS].map(|register| self.get(register))
    }

    /// As Linux's `mc146818_set_time` does it.
    fn set_time(&mut self, time: [u8; 7]) {
        let (control, frequency) = (self.get(REGISTER_B), self.get(REGISTER_A));
        self.set(REGISTER_B, control | SET);
        self.set(REGISTER_A, frequency | 0x70);
        let registers = [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS];
        registers.into_iter().zip(time).for_each(|(register, value)| self.set(register, value));
        self.set(REGISTER_B, control);
        self.set(REGISTER_A, frequency);
    }
}

#[test]
fn it_tells_the_hosts_time_in_bcd() {
    let mut driver = Driver::new();
    assert_eq!(driver.time(), [0x20, 0x26, 0x11, 0x21, 0x14, 0x05, 0x09]);
    assert_eq!(driver.get(DAY_OF_WEEK), 7);
    driver.pass(51_000 * MS);
    assert_eq!(driver.time(), [0x20, 0x26, 0x11, 0x21, 0x14, 0x06, 0x00]);
    assert_eq!((driver.get(REGISTER_D), driver.get(REGISTER_C)), (VALID, 0));
}

#[test]
fn binary_and_12_hours() {
    let mut driver = Driver::new();
    driver.set(REGISTER_B, HOURS_24 | BINARY);
    assert_eq!(driver.time(), [20, 26, 11, 21, 14, 5, 9]);
    driver.set(REGISTER_B, BINARY);
    assert_eq!(driver.get(HOURS), PM | 2);
    for (hours, cell) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, PM | 0x12), (13, PM | 0x01), (23, PM | 0x11)]
    {
        assert_eq!((hours_cell(hours, 0), hour(cell, 0)), (cell, Some(hours as i8)));
    }
    assert_eq!([0x00, 0x13, PM, 0x1a].map(|cell| hour(cell, 0)), [None; 4]);
}

#[test]
fn what_the_guest_sets_goes_on_from_there_half_a_second_later() {
    let mut driver = Driver::new();
    driver.set_time([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    driver.pass(499 * MS);
    assert_eq!(driver.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    driver.pass(MS);
    assert_eq!(driver.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn while_it_is_set_it_stands_still() {
    let mut driver = Driver::new();
    driver.set(REGISTER_B, HOURS_24 | SET);
    driver.pass(5_000 * MS);
    assert_eq!(driver.get(SECONDS), 0x09);
    driver.set(SECONDS, 0x30);
    driver.set(REGISTER_B, HOURS_24);
    assert_eq!(driver.get(SECONDS), 0x30);
}

#[test]
fn a_running_clock_takes_single_registers() {
    let mut driver = Driver::new();
    driver.pass(700 * MS);
    driver.set(HOURS, 0x03);
    assert_eq!(driver.time(), [0x20, 0x26, 0x11, 0x21, 0x03, 0x05, 0x09]);
    driver.pass(300 * MS);
    assert_eq!(driver.get(SECONDS), 0x10, "how far the second had got is kept");
}

#[test]
fn a_date_that_is_none_changes_nothing() {
    let mut driver = Driver::new();
    driver.set_time([0x20, 0x26, 0x02, 0x30, 0x00, 0x00, 0x00]);
    assert_eq!(driver.time(), [0x20, 0x26, 0x11, 0x21, 0x14, 0x05, 0x09]);
    driver.set(MINUTES, 0x6a);
    assert_eq!(driver.get(MINUTES), 0x05);
}

#[test]
fn an_update_is_announced_244_microseconds_before() {
    let mut driver = Driver::new();
    driver.pass(1_000 * MS - 244_001);
    assert_eq!(driver.get(REGISTER_A) & UPDATE_IN_PROGRESS, 0);
    driver.pass(1);
    assert_eq!(
        (driver.get(REGISTER_A) & UPDATE_IN_PROGRESS, driver.get(SECONDS)),
        (UPDATE_IN_PROGRESS, 0x09)
    );
    driver.pass(244_000);
    assert_eq!((driver.get(REGISTER_A) & UPDATE_IN_PROGRESS, driver.get(SECONDS)), (0, 0x10));
}

#[test]
fn a_restored_clock_has_the_hosts_time_and_the_guests_offset() {
    let mut driver = Driver::new();
    driver.set_time([0x20, 0x26, 0x11, 0x21, 0x15, 0x05, 0x09]);
    driver.set(0x40, 0xa5);
    let day = 86_400_000 * MS;
    let mut later = Driver::with(&driver.rtc.save(), SATURDAY + day);
    assert_eq!(later.time(), [0x20, 0x26, 0x11, 0x22, 0x15, 0x05, 0x09]);
    assert_eq!(later.get(0x40), 0xa5);
}

#[test]
fn interrupts_cannot_be_turned_on() {
    let mut driver = Driver::new();
    driver.set(REGISTER_B, HOURS_24 | INTERRUPTS);
    driver.set(REGISTER_C, 0xff);
    driver.set(REGISTER_D, 0);
    let [b, c, d] = [REGISTER_B, REGISTER_C, REGISTER_D].map(|register| driver.get(register));
    assert_eq!((b, c, d), (HOURS_24, 0, VALID));
}

#[test]
fn elsewhere_is_nothing() {
    let mut driver = Driver::new();
    let mut wide = [0; 2];
    driver.rtc.read(DATA_PORT, &mut wide);
    assert_eq!(wide, [0xff; 2]);
    let mut byte = [0];
    driver.rtc.read(INDEX_PORT, &mut byte);
    assert_eq!(byte, [0xff]);
    driver.rtc.write(DATA_PORT, &[0, 0]);
    driver.rtc.write(2, &[0]);
    assert_eq!(driver.rtc.save(), RtcState::default());
}

#[test]
fn a_state_that_no_clock_has_is_refused() {
    let refused = |change: &dyn Fn(&mut RtcState)| {
        let mut state = RtcState::default();
        change(&mut state);
        Rtc::from_state(&state, Box::new(|| Duration::ZERO)).err()
    };
    assert_eq!(refused(&|_| ()), None);
    assert_eq!(refused(&|state| state.cells.truncate(3)), Some(RtcStateError::Cells(3)));
    for (register, value) in [(REGISTER_A, 0xa6), (REGISTER_B, 0x42), (REGISTER_C, 1), (REGISTER_D, 0)] {
        let expected = Some(RtcStateError::Register { register, value });
        assert_eq!(refused(&|state| state.cells[register] = value), expected);
    }
    assert!(refused(&|state| state.index = 128).is_some());
    assert!(refused(&|state| state.offset = i128::MIN).is_some());
}
