//! COM1, and the ports that end the VM.

use super::cpu::{in8, out8};
use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const EXIT: u16 = 0xf4;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line. Only one CPU may print at a time.
pub fn line(text: fmt::Arguments<'_>) {
    let _ = Console.write_fmt(text);
    let _ = Console.write_str("\n");
}

/// Ends the VM with `status`.
pub fn exit(status: u8) -> ! {
    loop {
        out8(EXIT, status);
    }
}
