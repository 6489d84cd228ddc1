//! Timers that went off while nobody looked.
//!
//! In: `files.img` of a dump. Out: the same, in which each periodic timerfd that has gone off is about to go off again. Holds:
//! nothing else is changed, and what is not understood stays as it is.
//!
//! A timerfd that has gone off is armed again by the kernel when it is read, and until then says that nothing remains. CRIU 4.2
//! writes that down, and restores it as one that is off for ever. Processes that stood still before the dump have such.
//!
//! Sources: Linux `fs/timerfd.c`; CRIU `images/fdinfo.proto`, `images/timerfd.proto`.

use anyhow::{Context, Result};
use std::fs;
use std::ops::Range;
use std::path::Path;

/// Two words that tell what the file is.
const HEADER: usize = 8;
/// `tfd` in `file_entry`.
const TFD: u64 = 12;
// In `timerfd_entry`.
const TICKS: u64 = 5;
const VALUE: [u64; 2] = [7, 8];
const INTERVAL: [u64; 2] = [9, 10];

/// Corrects a dump.
pub(crate) fn arm_again(images: &Path) -> Result<()> {
    let path = images.join("files.img");
    let mut bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let places = silent(&bytes);
    if places.is_empty() {
        return Ok(());
    }
    // A nanosecond.
    places.iter().for_each(|&place| bytes[place] = 1);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Where the nanoseconds stand of timers that have gone off; each is a byte, which is 0.
fn silent(file: &[u8]) -> Vec<usize> {
    let mut places = Vec::new();
    let mut at = HEADER;
    while let Some(len) = file.get(at..at + 4).and_then(|len| len.try_into().ok()).map(u32::from_le_bytes) {
        let entry = at + 4..at + 4 + len as usize;
        if entry.end > file.len() {
            break;
        }
        at = entry.end;
        let timer = fields(file, entry).into_iter().flatten().find(|field| field.number == TFD);
        places.extend(timer.and_then(|timer| nanoseconds(file, timer.range)));
    }
    places
}

fn nanoseconds(file: &[u8], timer: Range<usize>) -> Option<usize> {
    let fields = fields(file, timer)?;
    let value = |number| fields.iter().find(|field| field.number == number).map_or(0, |field| field.value);
    let none = |numbers: [u64; 2]| numbers.iter().all(|&number| value(number) == 0);
    let silent = value(TICKS) > 0 && none(VALUE) && !none(INTERVAL);
    let place = fields.iter().find(|field| field.number == VALUE[1])?.range.clone();
    (silent && place.len() == 1).then_some(place.start)
}

/// A field of a message in the encoding of Protocol Buffers.
struct Field {
    number: u64,
    /// Of one that is a number.
    value: u64,
    /// Where its value stands.
    range: Range<usize>,
}

/// All fields of a message, unless it is none.
fn fields(file: &[u8], message: Range<usize>) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    let mut at = message.start;
    while at < message.end {
        let (key, start) = number(file, at)?;
        let (value, range) = match key & 7 {
            0 => number(file, start).map(|(value, end)| (value, start..end))?,
            1 => (0, start..start + 8),
            2 => {
                let (len, start) = number(file, start)?;
                (0, start..start.checked_add(usize::try_from(len).ok()?)?)
            }
            5 => (0, start..start + 4),
            _ => return None,
        };
        at = range.end;
        fields.push(Field { number: key >> 3, value, range });
    }
    (at == message.end).then_some(fields)
}

/// A number of up to ten bytes with seven bits each, the lowest first, and where it ends.
fn number(file: &[u8], at: usize) -> Option<(u64, usize)> {
    let bytes = file.get(at..)?.iter().take(10);
    let len = bytes.clone().position(|byte| byte & 0x80 == 0)? + 1;
    let value = bytes.take(len).rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f));
    Some((value, at + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `files.img` with one timer: what remains in nanoseconds, the interval likewise, and how often it went off.
    fn image(value: u8, interval: u8, ticks: u8) -> Vec<u8> {
        let timer = [8, 7, 16, 2, 26, 0, 32, 1, 40, ticks, 48, 0, 56, 0, 64, value, 72, 0, 80, interval];
        let entry = [&[8, 17, 16, 7, 98, timer.len() as u8][..], &timer].concat();
        [&[0; HEADER][..], &(entry.len() as u32).to_le_bytes(), &entry].concat()
    }

    #[test]
    fn a_periodic_timer_that_went_off_goes_off_again() {
        let file = image(0, 100, 1);
        let [place] = silent(&file)[..] else { panic!("{:?}", silent(&file)) };
        let mut corrected = file;
        corrected[place] = 1;
        assert_eq!(corrected, image(1, 100, 1));
    }

    #[test]
    fn any_other_timer_stays_as_it_is() {
        for (value, interval, ticks) in [(5, 100, 1), (0, 0, 1), (0, 100, 0)] {
            assert!(silent(&image(value, interval, ticks)).is_empty());
        }
    }

    #[test]
    fn a_file_that_is_cut_off_anywhere_has_none_or_the_same() {
        let file = image(0, 100, 1);
        for len in 0..file.len() {
            assert!(silent(&file[..len]).is_empty());
        }
        let odd = [&file[..], &[255; 40]].concat();
        assert_eq!(silent(&odd), silent(&file));
    }
}
