//! Bochs's screen, which nobody looks at.
//!
//! In: Bochs's process. Out: nothing. Holds: what Bochs draws is read as it comes: its terminal takes some 64 KiB, and then Bochs
//! would stand still for ever, after minutes of its own time.
//!
//! With its debugger built in, Bochs draws on a pseudo-terminal of its own, of which it holds the near end. No option says which.

use super::pty;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How often it is looked for, and how many times.
const LOOK: (Duration, usize) = (Duration::from_millis(100), 600);

/// Reads what this process draws until it ends.
pub(super) fn drain(process: u32) {
    thread::spawn(move || {
        for _ in 0..LOOK.1 {
            thread::sleep(LOOK.0);
            if let Ok(Some(mut screen)) = find(process) {
                let mut drawn = [0; 4096];
                while screen.read(&mut drawn).is_ok_and(|len| len > 0) {}
                return;
            }
        }
    });
}

/// The far end of the pseudo-terminal whose near end the process has open; none so far.
fn find(process: u32) -> io::Result<Option<File>> {
    let own = Path::new("/proc").join(process.to_string());
    for open in fs::read_dir(own.join("fd"))? {
        let open = open?;
        if fs::read_link(open.path())? != Path::new("/dev/ptmx") {
            continue;
        }
        let about = fs::read_to_string(own.join("fdinfo").join(open.file_name()))?;
        if let Some(index) = about.lines().find_map(|line| line.strip_prefix("tty-index:")) {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NOCTTY);
            let far = options.open(Path::new("/dev/pts").join(index.trim()))?;
            pty::set_raw(&far)?;
            return Ok(Some(far));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_screen_is_found_and_never_full() {
        let pty::Pty { near, far } = pty::Pty::open().unwrap();
        let mut zeroes = Command::new("head");
        zeroes.args(["-c", "1048576", "/dev/zero"]).stdout(Stdio::from(near));
        let mut drawing = zeroes.spawn().unwrap();
        drop((far, zeroes));
        drain(drawing.id());
        let ended = (0..600).find_map(|_| {
            thread::sleep(Duration::from_millis(50));
            drawing.try_wait().unwrap()
        });
        let _ = drawing.kill();
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    }
}
