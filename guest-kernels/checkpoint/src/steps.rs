//! What a verb took.
//!
//! In: the end of each step. Out: `name_ms=` for each, in milliseconds. Holds: the steps are one after another, so that their sum is
//! the whole.

use std::fmt;
use std::time::Instant;

/// Steps so far.
pub(crate) struct Steps {
    last: Instant,
    done: Vec<(&'static str, f64)>,
}

impl Steps {
    pub(crate) fn new() -> Steps {
        Steps { last: Instant::now(), done: Vec::new() }
    }

    /// What came since the last step was this.
    pub(crate) fn did(&mut self, name: &'static str) {
        let now = Instant::now();
        self.done.push((name, (now - self.last).as_secs_f64() * 1e3));
        self.last = now;
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.done.iter().map(|(name, ms)| format!("{name}_ms={ms:.1}")).collect();
        write!(f, "{}", words.join(" "))
    }
}
