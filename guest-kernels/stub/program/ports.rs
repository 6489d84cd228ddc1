//! The stub's two ports.
//!
//! In: text, words of the control port. Out: `out` instructions, which ring 3 may use since IOPL is 3. Holds: nothing is read
//! back.

use crate::abi;
use core::arch::asm;
use core::fmt;

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => { $crate::ports::line(format_args!($($text)*)) };
}
pub(crate) use say;

struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out(abi::SERIAL_PORT, byte));
        Ok(())
    }
}

/// Prints a line. A panic's text may have more than one: only its last line end is one.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let _ = fmt::write(&mut Serial, text);
    out(abi::SERIAL_PORT, b'\n');
}

/// Says something to the monitor, and waits for it to be dealt with.
pub(crate) fn control(word: u8) {
    out(abi::CONTROL_PORT, word);
}

/// The monitor reads and writes memory meanwhile, so the compiler must have it in order.
fn out(port: u16, value: u8) {
    // SAFETY: IOPL is 3; what the monitor writes is zeroed RAM, of which no reference exists yet.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}
