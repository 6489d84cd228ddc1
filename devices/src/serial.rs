//! A 16550A serial port, on vm-superio's register model.
//!
//! In: register accesses, and input bytes from the host, as many as there is room for. Out: interrupts, and output bytes
//! to the host, one by one. Holds: the guest never waits for an output that fails; a restored port raises no interrupt,
//! because what was raised before it was saved is in the interrupt controller's state.
//!
//! Linux tells UARTs apart by the top bits of IIR, which this model always sets as a 16550A with its FIFO on does. There
//! is no FIFO control register behind it, and none is needed: output is immediate.

use crate::{BusDevice, Interrupt, Persist, Request};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::io::{self, Write};
use thiserror::Error;
use vm_superio::serial::{Error as PortError, SerialEvents};
use vm_superio::{Trigger, serial, serial::Serial as Port};

/// Number of registers.
const REGISTERS: u64 = 8;
/// Bytes of input that the port holds for the guest.
const INPUT_MAX: usize = 64;

/// Bits of the interrupt enable register that a 16550A has.
const IER_BITS: u8 = 0x0f;
/// What the interrupt identification register can be: nothing, transmitter empty, data available, both.
const IIR_VALUES: [u8; 4] = [0x01, 0x02, 0x04, 0x06];
/// Line status of a transmitter that is always empty.
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
/// Line status: input is waiting.
const LSR_DATA_READY: u8 = 0x01;
/// Modem status of a line that is always up: carrier, data set ready, clear to send.
const MSR_LINE_UP: u8 = 0xb0;

/// The registers, and the input that the guest has not read. Field by field vm-superio's own state, which has no serde.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR without its FIFO bits; a pending transmit interrupt is here.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Input that the guest has not read yet, oldest first; at most 64 bytes.
    pub in_buffer: Vec<u8>,
}

/// Why a [`SerialState`] was refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("serial port: {what} is {value:#x}, expected {expected}")]
pub struct SerialStateError {
    what: &'static str,
    value: usize,
    expected: &'static str,
}

/// A port's ends in the host.
pub struct SerialHost {
    /// The interrupt line.
    pub irq: Box<dyn Interrupt>,
    /// Where output goes. What it refuses is lost and counted.
    pub out: Box<dyn Write + Send>,
    /// Called when the guest has read the last byte of input, so that there is room again. It runs on a vCPU thread that
    /// has the port locked: it may signal another thread, and must not come back to the port.
    pub drained: Box<dyn Fn() + Send>,
}

impl SerialHost {
    /// Ends for a port whose input side needs no waking.
    pub fn new(irq: Box<dyn Interrupt>, out: Box<dyn Write + Send>) -> Self {
        Self { irq, out, drained: Box::new(|| {}) }
    }
}

/// A serial port.
pub struct Serial {
    port: Port<Line, Drained, Box<dyn Write + Send>>,
    lost_output: u64,
    lost_interrupts: u64,
}

impl Serial {
    /// A port as after power-on.
    pub fn new(host: SerialHost) -> Self {
        Self::around(Port::with_events(Line::muted(host.irq), Drained(host.drained), host.out))
    }

    fn around(port: Port<Line, Drained, Box<dyn Write + Send>>) -> Self {
        port.interrupt_evt().muted.set(false);
        Self { port, lost_output: 0, lost_interrupts: 0 }
    }

    /// How many bytes of input the port can take now. None in loopback mode, where the line is cut off.
    pub fn room(&self) -> usize {
        const MCR_LOOPBACK: u8 = 1 << 4;
        match self.port.state().modem_control & MCR_LOOPBACK {
            0 => self.port.fifo_capacity(),
            _ => 0,
        }
    }

    /// Gives the guest as much of `input` as there is room for, and returns how many bytes that was.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(self.room());
        let done = self.port.enqueue_raw_bytes(&input[..taken]).map(|_| ());
        self.count_loss(done);
        taken
    }

    /// Bytes of output that the host refused, since the port was made.
    pub fn lost_output(&self) -> u64 {
        self.lost_output
    }

    /// Interrupts that the host refused, since the port was made.
    pub fn lost_interrupts(&self) -> u64 {
        self.lost_interrupts
    }

    fn count_loss(&mut self, done: Result<(), PortError<io::Error>>) {
        match done {
            Ok(()) | Err(PortError::FullFifo) => {}
            Err(PortError::IOError(_)) => self.lost_output += 1,
            Err(PortError::Trigger(_)) => self.lost_interrupts += 1,
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match data {
            [byte] if offset < REGISTERS => *byte = self.port.read(offset as u8),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        if let ([byte], 0..REGISTERS) = (data, offset) {
            let done = self.port.write(offset as u8, *byte);
            self.count_loss(done);
        }
        None
    }
}

impl Persist for Serial {
    type State = SerialState;
    type Host = SerialHost;
    type Error = SerialStateError;

    fn save(&self) -> SerialState {
        self.port.state().into()
    }

    fn from_state(state: &SerialState, host: SerialHost) -> Result<Self, SerialStateError> {
        state.check()?;
        let line = Line::muted(host.irq);
        Port::from_state(&state.to_port(), line, Drained(host.drained), host.out)
            .map(Self::around)
            .map_err(|_| too_much_input(state.in_buffer.len()))
    }
}

/// As after power-on.
impl Default for SerialState {
    fn default() -> Self {
        serial::SerialState::default().into()
    }
}

impl From<serial::SerialState> for SerialState {
    fn from(port: serial::SerialState) -> Self {
        Self {
            baud_divisor_low: port.baud_divisor_low,
            baud_divisor_high: port.baud_divisor_high,
            interrupt_enable: port.interrupt_enable,
            interrupt_identification: port.interrupt_identification,
            line_control: port.line_control,
            line_status: port.line_status,
            modem_control: port.modem_control,
            modem_status: port.modem_status,
            scratch: port.scratch,
            in_buffer: port.in_buffer,
        }
    }
}

impl SerialState {
    /// Refuses what the registers of this model can't hold; the others can hold any byte.
    fn check(&self) -> Result<(), SerialStateError> {
        let refuse =
            |what, value: u8, expected| Err(SerialStateError { what, value: value.into(), expected });
        let ready = if self.in_buffer.is_empty() { 0 } else { LSR_DATA_READY };
        if self.in_buffer.len() > INPUT_MAX {
            Err(too_much_input(self.in_buffer.len()))
        } else if self.interrupt_enable & !IER_BITS != 0 {
            refuse("interrupt enable", self.interrupt_enable, "the low four bits only")
        } else if !IIR_VALUES.contains(&self.interrupt_identification) {
            refuse("interrupt identification", self.interrupt_identification, "1, 2, 4 or 6")
        } else if self.line_status != LSR_TRANSMITTER_EMPTY | ready {
            refuse("line status", self.line_status, "0x61 with input waiting, 0x60 without")
        } else if self.modem_status != MSR_LINE_UP {
            refuse("modem status", self.modem_status, "0xb0")
        } else {
            Ok(())
        }
    }

    fn to_port(&self) -> serial::SerialState {
        serial::SerialState {
            baud_divisor_low: self.baud_divisor_low,
            baud_divisor_high: self.baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.in_buffer.clone(),
        }
    }
}

fn too_much_input(len: usize) -> SerialStateError {
    SerialStateError { what: "length of waiting input", value: len, expected: "at most 64 bytes" }
}

/// The interrupt line as vm-superio drives it. It drives it on restore as well, which this model must not: hence `muted`.
struct Line {
    irq: Box<dyn Interrupt>,
    muted: Cell<bool>,
}

impl Line {
    fn muted(irq: Box<dyn Interrupt>) -> Self {
        Self { irq, muted: Cell::new(true) }
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.muted.get() { Ok(()) } else { self.irq.trigger() }
    }
}

/// Passes on that the input has been read to its end.
struct Drained(Box<dyn Fn() + Send>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        (self.0)();
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
