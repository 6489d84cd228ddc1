//! The disk is full, or the file may not grow: the old snapshot stays, and nothing else.

use crate::machine::{Machine, chain};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Tells the tests below, which run in a process of their own, where to write and which words to expect.
const DIR: &str = "SNAPSHOT_TEST_DIR";
const EXPECTED: &str = "SNAPSHOT_TEST_EXPECTED";

/// Runs `child` from a shell, which `around` starts and which first makes things tight.
fn run_child(around: &[&str], tighten: &str, expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("{tighten} && exec \"$0\" --ignored --exact disk_full::child");
    let words = [around, &["sh", "-c", &script]].concat();
    let child = Command::new(words[0])
        .args(&words[1..])
        .arg(std::env::current_exe().unwrap())
        .env(DIR, dir.path())
        .env(EXPECTED, expected)
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&[child.stdout, child.stderr].concat()).into_owned();
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}

#[test]
fn a_full_disk() {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let namespace = ["unshare", if root { "-m" } else { "-rm" }];
    let mount = format!("mount -t tmpfs -o size=2m tmpfs \"${DIR}\"");
    run_child(&namespace, &mount, "No space left on device");
}

#[test]
fn a_limit_on_the_length_of_files() {
    run_child(&[], "trap '' XFSZ; ulimit -f 2048", "File too large");
}

#[test]
#[ignore = "run by the other tests of this file, where there is little room"]
fn child() {
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    let path = dir.join("a.snap");
    Machine::tiny().write(&path).unwrap();
    let old = fs::read(&path).unwrap();
    let pages: Vec<u64> = (0..1024).map(|page| page << 12).collect();
    let error = Machine::with_ram(&[(0, 8 << 20)], &pages).write(&path).unwrap_err();
    let message = chain(&error);
    assert!(message.contains(&std::env::var(EXPECTED).unwrap()) && message.contains("a.snap"), "{message}");
    assert_eq!(fs::read(&path).unwrap(), old);
    assert_eq!(names(&dir), ["a.snap"]);
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
