use super::*;
use std::time::{Duration, Instant};

fn outcome(name: &'static str, works: Option<bool>) -> Tried {
    Tried { name, works, reason: None, without: "" }
}

#[test]
fn only_what_linux_needs_decides_about_linux() {
    let needed = PROBES.iter().find(|probe| probe.linux_needs_it).unwrap().name;
    let other = PROBES.iter().find(|probe| !probe.linux_needs_it).unwrap().name;
    assert!(verdict(None, &[outcome(needed, Some(true)), outcome(other, Some(false))]).possible);
    assert!(verdict(None, &[outcome(needed, None)]).possible);
    let no = verdict(None, &[outcome(needed, Some(false)), outcome(other, Some(true))]);
    assert!(!no.possible && no.reason.unwrap().contains(needed));
    assert_eq!(verdict(Some("no KVM"), &[]).reason.as_deref(), Some("no KVM"));
}

#[test]
fn a_host_without_kvm_is_told_in_one_line() {
    let linux = verdict(Some("/dev/kvm is not there"), &[]);
    let report =
        Report { problem: None, kvm: None, ring0_mips: None, capabilities: vec![], probes: vec![], linux };
    assert_eq!(report.to_string(), "Linux guests: no, because /dev/kvm is not there");
}

/// On any host: the verdict and the quick check agree, quickly, and the report says the same in both forms.
#[test]
fn the_quick_check_agrees_with_the_whole_report() {
    let begun = Instant::now();
    let quick = can_run_linux();
    assert!(begun.elapsed() < Duration::from_secs(1), "took {:?}", begun.elapsed());
    let report = examine();
    assert_eq!(quick.is_ok(), report.linux.possible, "{quick:?}");
    assert!(quick.err().is_none_or(|line| !line.contains('\n')));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["linux"]["possible"], report.linux.possible);
    println!("{report}");
}
