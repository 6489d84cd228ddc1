//! Why a lab's machine died.
//!
//! In: how its emulator ended, or what else was seen of it, its kernel's log. Out: the reason in words; and whether it was a fault of
//! the machine, which another try need not meet again. Holds: what a command can bring about is no such fault, and so fails at the first time.

use std::process::ExitStatus;

/// Lines of a dead machine's log that are shown.
const LOG_TAIL: usize = 40;
/// What Linux says when the processor has not kept to its manual: stacks or registers that nobody has written. A full memory, a first
/// program that ends, and `sysrq` are panics too, but a command's doing.
const FAULTS: [&str; 4] = [
    "Kernel panic - not syncing: corrupted stack end detected inside scheduler",
    "Kernel panic - not syncing: Fatal exception",
    "Kernel panic - not syncing: Attempted to kill the idle task!",
    "Kernel panic - not syncing: double fault",
];

/// The fault of a machine that has died of one.
pub(super) fn fault(emulator: ExitStatus, log: &str) -> Option<&str> {
    let panics = || log.lines().filter_map(|line| Some(line[line.find("Kernel panic")?..].trim_end()));
    if let Some(panic) = panics().next() {
        return FAULTS.iter().any(|fault| panic.starts_with(fault)).then_some(panic);
    }
    // QEMU ends, as it does after a power-off, but the kernel has said nothing of one.
    let orderly = log.contains("reboot: ");
    (emulator.success() && !orderly).then_some("a triple fault, or a reset without a word")
}

/// Why a machine died, in one line, and the last lines of its log. `seen` is what was seen of it from outside.
pub(super) fn post_mortem(seen: &str, log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().find_map(|line| Some(&line[line.find("Kernel panic")?..]));
    let reason = panic.map_or(seen.to_owned(), |panic| format!("\"{panic}\""));
    let tail = lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n");
    format!("the lab died before the command ended: {reason}; the end of its log:\n{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_post_mortem_names_the_panic_and_ends_with_the_log() {
        let log = "[ 1.0] up\r\n\r\n[ 2.0] Kernel panic - not syncing: why\r\n[ 2.1] trace\r\n";
        let text = post_mortem("its emulator ended", log);
        let first = text.lines().next().unwrap();
        assert!(first.contains(": \"Kernel panic - not syncing: why\";"), "{first}");
        assert!(text.ends_with("\n[ 2.1] trace"), "{text}");
    }

    #[test]
    fn a_post_mortem_without_a_panic_names_the_emulator_and_is_short() {
        let log: String = (0..1000).map(|n| format!("line {n}\n")).collect();
        let text = post_mortem("its emulator ended with exit status: 1", &log);
        assert!(text.contains("exit status: 1") && text.ends_with("line 999"), "{text}");
        assert_eq!(text.lines().count(), 1 + LOG_TAIL);
    }

    #[test]
    fn only_what_no_command_can_do_is_the_machines_fault() {
        let fault_of = |log: &str| fault(ExitStatus::from_raw(0), log).map(str::to_owned);
        let stack = "[17.1] BUG: TASK stack guard page was hit at 1\r\n[17.2] Kernel panic - not syncing: corrupted stack end \
                     detected inside scheduler\r\n";
        assert!(fault_of(stack).is_some_and(|why| why.ends_with("inside scheduler")));
        assert!(fault_of("[2.0] Kernel panic - not syncing: Fatal exception in interrupt\n").is_some());
        assert!(fault_of("[1.0] up\n").is_some_and(|why| why.starts_with("a triple fault")));
        for doing in [
            "sysrq triggered crash",
            "Attempted to kill init! exitcode=0x00000100",
            "Out of memory: compulsory",
        ] {
            assert_eq!(fault_of(&format!("[2.0] Kernel panic - not syncing: {doing}\n")), None, "{doing}");
        }
        assert_eq!(fault_of("[3.0] reboot: Power down\n"), None);
    }

    #[test]
    fn an_emulator_that_was_killed_is_no_fault_of_the_machine() {
        assert_eq!(fault(ExitStatus::from_raw(9), "[1.0] up\n"), None);
        assert_eq!(fault(ExitStatus::from_raw(1 << 8), ""), None);
    }
}
