//! Any guest, against every device: any offset, any length, any order. Nothing panics, and what a device says of itself
//! afterwards is a state that it takes back.

use devices::{AcpiPm, Bus, BusDevice, ExitPort, I8042, Interrupt, PanicDevice, Persist};
use devices::{HostTime, Rtc, RtcState};
use devices::{Serial, SerialHost, SerialState};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Input(Vec<u8>),
}

/// Offsets near the registers come up most, so that accesses have effects; lengths are those of an exit from KVM.
fn access() -> impl Strategy<Value = Access> {
    let offset = || prop_oneof![8 => 0u64..10, 1 => any::<u64>()];
    let len = || prop_oneof![4 => Just(1usize), 1 => 1usize..=8];
    prop_oneof![
        (offset(), len()).prop_map(|(offset, len)| Access::Read(offset, len)),
        (offset(), len().prop_flat_map(|len| vec(any::<u8>(), len)))
            .prop_map(|(offset, data)| Access::Write(offset, data)),
        vec(any::<u8>(), 0..100).prop_map(Access::Input),
    ]
}

/// About every tenth of these is accepted.
fn serial_state() -> impl Strategy<Value = SerialState> {
    let free = any::<[u8; 5]>();
    let interrupts = (prop_oneof![4 => 0u8..16, 1 => any::<u8>()], 0u8..8);
    let status = (0x60u8..0x62, prop_oneof![4 => Just(0xb0u8), 1 => any::<u8>()]);
    let input = prop_oneof![Just(vec![]), vec(any::<u8>(), 0..100)];
    (free, interrupts, status, input).prop_map(|(free, interrupts, status, in_buffer)| SerialState {
        baud_divisor_low: free[0],
        baud_divisor_high: free[1],
        interrupt_enable: interrupts.0,
        interrupt_identification: interrupts.1,
        line_control: free[2],
        line_status: status.0,
        modem_control: free[3],
        modem_status: status.1,
        scratch: free[4],
        in_buffer,
    })
}

struct NoLine;

impl Interrupt for NoLine {
    fn trigger(&self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::WouldBlock.into())
    }
}

fn serial_host() -> SerialHost {
    SerialHost::new(Box::new(NoLine), Box::new(std::io::sink()))
}

/// Offset 0 is the index port, 1 the data port: pairs of writes reach every register.
fn rtc_access() -> impl Strategy<Value = (u8, Option<u8>)> {
    let register = prop_oneof![4 => 0u8..14, 1 => Just(devices::RTC_CENTURY), 1 => any::<u8>()];
    let value = prop_oneof![2 => 0u8..0x60, 1 => any::<u8>()];
    (register, prop::option::of(value))
}

fn rtc_state() -> impl Strategy<Value = RtcState> {
    let time = vec(prop_oneof![3 => 0u8..0x13, 1 => any::<u8>()], 10);
    let modes = (any::<u8>(), any::<u8>(), prop_oneof![9 => Just(0), 1 => any::<u8>()]);
    let offset = prop_oneof![any::<i64>().prop_map(i128::from), any::<i128>()];
    (0u8..0x81, 127usize..129, time, modes, offset).prop_map(|(index, len, time, (a, b, c), offset)| {
        let mut cells = vec![0; len];
        cells[..10].copy_from_slice(&time);
        cells[10..14].copy_from_slice(&[a & 0x7f, b & 0x8f, c, 0x80]);
        RtcState { index, cells, offset }
    })
}

fn host_time(at: Duration) -> HostTime {
    Box::new(move || at)
}

fn drive(device: &mut impl BusDevice, accesses: &[Access]) {
    for access in accesses {
        match access {
            Access::Read(offset, len) => device.read(*offset, &mut vec![0; *len]),
            Access::Write(offset, data) => drop(device.write(*offset, data)),
            Access::Input(_) => {}
        }
    }
}

proptest! {
    #[test]
    fn stateless_devices_stand_any_access(accesses in vec(access(), 0..200)) {
        drive(&mut I8042, &accesses);
        drive(&mut AcpiPm, &accesses);
        drive(&mut PanicDevice, &accesses);
        drive(&mut ExitPort, &accesses);
    }

    #[test]
    fn a_serial_port_is_always_one_that_restores(accesses in vec(access(), 0..200)) {
        let mut serial = Serial::new(serial_host());
        for access in &accesses {
            if let Access::Input(bytes) = access {
                let room = serial.room();
                prop_assert_eq!(serial.enqueue(bytes), bytes.len().min(room));
            }
            drive(&mut serial, std::slice::from_ref(access));
            let state = serial.save();
            serial = Serial::from_state(&state, serial_host()).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(serial.save(), state);
        }
    }

    #[test]
    fn any_serial_state_is_refused_or_works(state in serial_state(), accesses in vec(access(), 0..20)) {
        if let Ok(mut serial) = Serial::from_state(&state, serial_host()) {
            prop_assert_eq!(serial.save(), state);
            drive(&mut serial, &accesses);
        }
    }

    #[test]
    fn a_clock_is_always_one_that_restores(
        accesses in vec(rtc_access(), 0..200),
        seconds in prop_oneof![0..1u64 << 33, any::<u64>()],
    ) {
        let at = Duration::new(seconds, 999_900_000);
        let mut rtc = Rtc::from_state(&RtcState::default(), host_time(at)).unwrap();
        for (register, value) in accesses {
            rtc.write(0, &[register]);
            match value {
                Some(value) => drop(rtc.write(1, &[value])),
                None => rtc.read(1, &mut [0]),
            }
            let state = rtc.save();
            rtc = Rtc::from_state(&state, host_time(at)).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(rtc.save(), state);
        }
    }

    #[test]
    fn any_clock_state_is_refused_or_works(
        state in rtc_state(),
        seconds in any::<u64>(),
        accesses in vec(access(), 0..20),
    ) {
        if let Ok(mut rtc) = Rtc::from_state(&state, host_time(Duration::from_secs(seconds))) {
            prop_assert_eq!(rtc.save(), state);
            drive(&mut rtc, &accesses);
            (0..=0xffu8).for_each(|register| {
                rtc.write(0, &[register]);
                rtc.read(1, &mut [0]);
            });
        }
    }

    #[test]
    fn a_bus_answers_as_a_list_of_its_ranges_would(
        ranges in vec((0u64..64, 0u64..16), 0..12),
        address in 0u64..80,
    ) {
        let (mut bus, mut list) = (Bus::new(), Vec::new());
        for (base, len) in ranges {
            let free = len > 0 && list.iter().all(|(b, l)| base + len <= *b || b + l <= base);
            let device = Arc::new(Mutex::new(ExitPort));
            prop_assert_eq!(bus.insert(base, len, device).is_ok(), free);
            if free {
                list.push((base, len));
            }
        }
        let first = list.iter().any(|(base, _)| *base == address);
        // No word of the control port, the device's second.
        prop_assert_eq!(bus.write(address, &[7]).is_some(), first);
    }
}
