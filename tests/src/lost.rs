//! Guests that the lab's processor loses (`lab::qemu` tells how).
//!
//! In: what was said of one, or by it. Out: whether it went as those go. Holds: it says so of no guest that panicked with a word; whoever asks
//! tries once more, aloud, and but once in a run, so that a guest that we lose is not overlooked.

/// What the monitor says.
const TRIPLE_FAULT: &str = "the guest asked for a reset by a triple fault";
const PANICKED: &str = "the guest's kernel panicked";
/// What a kernel that panics says itself, unless it has lost its own data.
const LAST_WORDS: &str = "Kernel panic";
/// What is said of one that was waited for in vain, as one is whose processor waits for the end of an interrupt that never came.
const TIME_IS_UP: &str = "the time is up";

/// Whether the lab may have lost it.
pub fn by_the_lab(said: &str) -> bool {
    let without_a_word = said.contains(PANICKED) && !said.contains(LAST_WORDS);
    said.contains(TRIPLE_FAULT) || without_a_word || said.contains(TIME_IS_UP)
}

#[cfg(test)]
mod tests {
    use super::by_the_lab;

    #[test]
    fn a_guest_that_says_why_is_not_lost() {
        assert!(
            by_the_lab("vmm: the guest's kernel panicked")
                && by_the_lab("x: the time is up; the last lines were:")
        );
        assert!(!by_the_lab("Kernel panic - not syncing\nvmm: the guest's kernel panicked"));
        assert!(!by_the_lab("the guest ended early: run status=1"));
    }
}
