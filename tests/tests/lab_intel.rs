//! The lab's Intel lane keeps the promises that `lab.rs` tests on the other one.

use std::path::PathBuf;
use vmm_tests::lab::{Lab, Lane};

/// A directory with the program that tries /dev/kvm.
fn with_probe() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(PathBuf::from(env!("CARGO_BIN_EXE_kvm_probe")), dir.path().join("kvm_probe")).unwrap();
    dir
}

fn lab() -> Lab {
    Lab::new().lane(Lane::Intel)
}

#[test]
fn status_and_bytes_come_back_unchanged_and_the_disk_is_whole() {
    let vmlinux = guest_kernels::ensure("7.2").unwrap().vmlinux;
    let tail = std::fs::read(vmlinux).unwrap().split_off((1 << 20) * 20);
    let mut out = Vec::new();
    let command = "tail -c +20971521 /guests/7.2/vmlinux | head -c 200000; echo error >&2; exit 7";
    let status = lab().stream(command, &mut out).unwrap();
    assert_eq!(status, 7);
    assert_eq!(out.len(), 200_006);
    assert!(out.starts_with(&tail[..200_000]) && out.ends_with(b"error\n"), "bytes were changed");
}

// `linux.rs` tells stories on the 6.1 host, with nested and with shadow paging.
#[test]
fn kvm_works_on_another_host_kernel() {
    kvm_works("7.2", "", "Y");
}

fn kvm_works(host: &str, args: &str, ept: &str) {
    let dir = with_probe();
    let lab = lab().host(host).kvm_args(args).extra(dir.path());
    let result = lab.run("uname -r; cat /sys/module/kvm_intel/parameters/ept; /extra/kvm_probe").unwrap();
    let release = guest_kernels::ensure(host).unwrap().release;
    assert_eq!(result.output, format!("{release}\n{ept}\nkvm: 40 + 2 = 42\n"), "host {host} {args}");
}

#[test]
fn a_panic_ends_the_lab_with_its_kernels_last_words() {
    let error = lab().run("echo c > /proc/sysrq-trigger; sleep 60").unwrap_err().to_string();
    assert!(error.lines().next().unwrap().contains("Kernel panic - not syncing"), "{error}");
}
