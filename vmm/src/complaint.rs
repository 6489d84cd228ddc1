//! What is said when something fails: one line.
//!
//! In: an error with its causes, or clap's several lines. Out: one line for standard error or an API reply. Holds: a name
//! from a file or the command line cannot add a line or upset a terminal, and no cause is told twice.

use std::error::Error;
use std::io::{self, Write};

/// Says a line on standard error. A standard error that takes nothing is no reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The error and its causes, outermost first. A cause that the text before it already ends with is left out.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let told = cause.to_string();
        if !text.ends_with(&told) {
            text = format!("{text}: {told}");
        }
        next = cause.source();
    }
    printable(&text)
}

/// What is wrong with the command line: clap's first paragraph without its indents. `None` where clap has help or its
/// version to print.
pub fn usage(error: &clap::Error) -> Option<String> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayHelpOnMissingArgumentOrSubcommand | DisplayVersion) {
        return None;
    }
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(" ");
    Some(printable(line.strip_prefix("error: ").unwrap_or(&line)))
}

/// Control characters as Rust writes them in a string.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use crate::kvm::Ioctl;
    use clap::Parser;
    use vmm_sys_util::errno;

    #[test]
    fn a_cause_is_told_once() {
        let error = Ioctl { call: "KVM_RUN", source: errno::Error::new(libc::EINVAL) };
        assert_eq!(one_line(&error), "KVM_RUN failed: Invalid argument (os error 22)");
    }

    #[test]
    fn a_name_adds_no_line() {
        assert_eq!(printable("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
    }

    #[test]
    fn wrong_usage_is_one_line() {
        let said = |args: &[&str]| usage(&Cli::try_parse_from(args).unwrap_err());
        let missing = said(&["vmm", "run"]).unwrap();
        assert_eq!(missing, "the following required arguments were not provided: --kernel <FILE>");
        let entry = said(&["vmm", "run", "--kernel", "k", "--entry", "x"]).unwrap();
        assert_eq!(entry, "invalid value 'x' for '--entry <ENTRY>' [possible values: auto, linux, pvh]");
        assert_eq!(said(&["vmm", "--help"]), None);
        assert_eq!(said(&["vmm", "--version"]), None);
        assert_eq!(said(&["vmm"]), None);
    }
}
