//! Other people's programs read a snapshot as the core file it is.

use crate::machine::Machine;
use std::{path::Path, process::Command};

/// `setup.sh` installs them.
fn run(program: &str, args: &[&str], file: &Path) -> String {
    let output = Command::new(program).args(args).arg(file).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn assert_has(output: &str, expected: &[&str]) {
    for text in expected {
        assert!(output.contains(text), "no {text:?} in:\n{output}");
    }
}

#[test]
fn readelf_shows_notes_and_ram() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    Machine::small().write(&path).unwrap();
    let output = run("readelf", &["-lnW"], &path);
    let ram = "0x0000000100000000 0x002000 0x002000 RWE";
    assert_has(&output, &["CORE (Core file)", "NT_PRSTATUS", "VMCOREINFO", "VMMSNAP", ram]);
    assert_eq!(output.matches("NT_").count(), 2, "other notes than the registers' have a meaning:\n{output}");
    assert!(!output.to_lowercase().contains("warning"), "{output}");
    assert!(!output.to_lowercase().contains("corrupt"), "{output}");
}

#[test]
fn gdb_shows_each_vcpu_and_reads_ram() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    Machine::small().write(&path).unwrap();
    let mut args = vec!["-nx", "-batch"];
    let commands =
        ["info threads", "info registers rip rax", "thread 2", "info registers rip rax", "x/1xb 0x7000"];
    args.extend(commands.iter().flat_map(|command| ["-ex", command]));
    args.push("-core");
    let output = run("gdb", &args, &path);
    assert_has(&output, &["0x1000", "0xabc1", "0x2000", "0xabc2", "LWP 1", "LWP 2", "0x87"]);
    assert!(!output.contains("Section `"), "a note was taken for registers:\n{output}");
}
