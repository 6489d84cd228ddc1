//! What a guest and a host see of the serial port.

use super::*;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

/// Counts calls of an interrupt line, or of `drained`.
#[derive(Clone, Default)]
struct Count(Arc<AtomicU32>);

impl Count {
    fn get(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

impl Interrupt for Count {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Relaxed);
        Ok(())
    }
}

/// What the host has got, and an output that keeps it.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Interrupt for Broken {
    fn trigger(&self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

fn host() -> (SerialHost, Count, Output) {
    let (irq, out) = (Count::default(), Output::default());
    (SerialHost::new(Box::new(irq.clone()), Box::new(out.clone())), irq, out)
}

fn read(serial: &mut Serial, offset: u64) -> u8 {
    let mut byte = [0];
    serial.read(offset, &mut byte);
    byte[0]
}

fn write(serial: &mut Serial, offset: u64, byte: u8) {
    assert_eq!(serial.write(offset, &[byte]), None);
}

#[test]
fn output_reaches_the_host_and_asks_for_more() {
    let (host, irq, out) = host();
    let mut serial = Serial::new(host);
    write(&mut serial, IER, 0x02);
    assert_eq!(irq.get(), 1, "an empty transmitter interrupts as soon as it may");
    assert_eq!(read(&mut serial, IIR), 0xc2);
    write(&mut serial, DATA, b'x');
    assert_eq!(irq.get(), 2);
    assert_eq!(*out.0.lock().unwrap(), b"x");
}

#[test]
fn input_is_taken_as_far_as_there_is_room() {
    let (mut host, irq, _) = host();
    let drained = Count::default();
    let signal = drained.clone();
    host.drained = Box::new(move || signal.trigger().unwrap());
    let mut serial = Serial::new(host);
    write(&mut serial, IER, 0x01);
    assert_eq!(serial.room(), 64);
    assert_eq!(serial.enqueue(&[7; 100]), 64);
    assert_eq!((serial.room(), irq.get()), (0, 1));
    assert_eq!(serial.enqueue(b"more"), 0);
    for left in (0..64).rev() {
        assert_eq!(drained.get(), 0);
        assert_eq!(read(&mut serial, DATA), 7, "{left} left");
    }
    assert_eq!((serial.room(), drained.get()), (64, 1));
    assert_eq!(read(&mut serial, LSR), 0x60);
}

#[test]
fn linux_finds_a_16550a() {
    let (host, ..) = host();
    let mut serial = Serial::new(host);
    // autoconfig(): IER keeps its four bits and no others; loopback mirrors modem control; IIR has both FIFO bits.
    write(&mut serial, IER, 0xff);
    assert_eq!(read(&mut serial, IER), 0x0f);
    write(&mut serial, IER, 0);
    write(&mut serial, MCR, 0x1a);
    assert_eq!(read(&mut serial, 6) & 0xf0, 0x90);
    write(&mut serial, MCR, 0x08);
    write(&mut serial, 2, 0x01);
    assert_eq!(read(&mut serial, IIR) >> 6, 3);
    // autoconfig_16550a(): neither an enhanced feature register, nor a 16750.
    write(&mut serial, LCR, 0xbf);
    assert_ne!(read(&mut serial, IIR), 0);
    write(&mut serial, 2, 0x21);
    assert_eq!(read(&mut serial, IIR) & 0xe0, 0xc0);
}

#[test]
fn loopback_cuts_the_line() {
    let (host, _, out) = host();
    let mut serial = Serial::new(host);
    write(&mut serial, MCR, 0x10);
    write(&mut serial, DATA, b'l');
    assert_eq!((serial.room(), serial.enqueue(b"host")), (0, 0));
    assert_eq!(read(&mut serial, DATA), b'l');
    assert!(out.0.lock().unwrap().is_empty());
}

#[test]
fn a_broken_host_is_counted_and_the_guest_goes_on() {
    let mut serial = Serial::new(SerialHost::new(Box::new(Broken), Box::new(Broken)));
    write(&mut serial, DATA, b'x');
    assert_eq!((serial.lost_output(), serial.lost_interrupts()), (1, 0));
    write(&mut serial, IER, 0x03);
    assert_eq!(serial.enqueue(b"in"), 2);
    assert_eq!((serial.lost_output(), serial.lost_interrupts()), (1, 2));
    assert_eq!(read(&mut serial, LSR), 0x61);
    assert_eq!(read(&mut serial, DATA), b'i');
}

#[test]
fn a_pending_transmit_interrupt_and_unread_input_survive() {
    let (first, ..) = host();
    let mut serial = Serial::new(first);
    write(&mut serial, IER, 0x03);
    assert_eq!(serial.enqueue(b"typed"), 5);
    write(&mut serial, 7, 0x5c);
    let bytes = postcard::to_stdvec(&serial.save()).unwrap();
    let (second, irq, _) = host();
    let mut restored = Serial::from_state(&postcard::from_bytes(&bytes).unwrap(), second).unwrap();
    assert_eq!(restored.save(), serial.save());
    assert_eq!(irq.get(), 0, "the interrupt controller has it already");
    assert_eq!(read(&mut restored, IIR), 0xc6);
    assert_eq!(read(&mut restored, DATA), b't');
    write(&mut restored, DATA, b'x');
    assert_eq!(irq.get(), 1, "the line is live again");
}

fn refused(spoil: impl FnOnce(&mut SerialState)) -> String {
    let (first, ..) = host();
    let mut state = Serial::new(first).save();
    spoil(&mut state);
    let (second, ..) = host();
    Serial::from_state(&state, second).err().expect("a state that no port has").to_string()
}

#[test]
fn a_state_that_no_port_has_is_refused() {
    assert_eq!(
        refused(|s| s.in_buffer = vec![0; 65]),
        "serial port: length of waiting input is 0x41, expected at most 64 bytes"
    );
    assert!(refused(|s| s.in_buffer = vec![0; 3]).contains("line status is 0x60"));
    assert!(refused(|s| s.line_status = 0x61).contains("line status is 0x61"));
    assert!(refused(|s| s.interrupt_enable = 0x10).contains("interrupt enable is 0x10"));
    assert!(refused(|s| s.interrupt_identification = 0).contains("interrupt identification is 0x0"));
    assert!(refused(|s| s.modem_status = 0).contains("modem status is 0x0"));
}

#[test]
fn registers_are_bytes_and_there_are_eight() {
    let (host, irq, out) = host();
    let mut serial = Serial::new(host);
    let fresh = serial.save();
    for (offset, data) in [(0, &[1u8, 2][..]), (8, &[1]), (256, &[1]), (u64::MAX, &[1; 8]), (0, &[])] {
        assert_eq!(serial.write(offset, data), None);
        let mut read = vec![0; data.len()];
        serial.read(offset, &mut read);
        assert!(read.iter().all(|b| *b == 0xff));
    }
    assert_eq!((serial.save(), irq.get(), out.0.lock().unwrap().len()), (fresh, 0, 0));
}
