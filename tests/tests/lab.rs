//! The lab keeps its promises: exact statuses, output as it comes, a limit, a working KVM.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmm_tests::lab::{Lab, TIMED_OUT};

/// Remembers when the first byte came.
#[derive(Default)]
struct Stopwatch {
    first: Option<Instant>,
    bytes: Vec<u8>,
}

impl Write for Stopwatch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            self.first.get_or_insert_with(Instant::now);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A directory with the program that tries /dev/kvm.
fn with_probe() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(PathBuf::from(env!("CARGO_BIN_EXE_kvm_probe")), dir.path().join("kvm_probe")).unwrap();
    dir
}

#[test]
fn the_commands_status_and_bytes_come_back_unchanged() {
    let text = "\"double\" 'single' $HOME `back` \\ | # % ü";
    let result = Lab::new().run(&format!("cat <<'END'\n{text}\nEND\necho to stderr >&2\nexit 7")).unwrap();
    assert_eq!((result.output, result.status, result.timed_out), (format!("{text}\nto stderr\n"), 7, false));
}

#[test]
fn output_comes_while_the_command_runs() {
    let mut out = Stopwatch::default();
    let status = Lab::new().stream("printf early; sleep 8; printf ' \\000\\377'", &mut out).unwrap();
    assert_eq!((status, out.bytes), (0, b"early \x00\xff".to_vec()));
    let ahead = out.first.unwrap().elapsed();
    assert!(ahead > Duration::from_millis(2500), "the first byte came only {ahead:?} before the end");
}

#[test]
fn a_command_that_never_ends_is_stopped_at_the_limit() {
    // The start counts, and takes as long as others let it.
    let began = Instant::now();
    Lab::new().run("true").unwrap();
    let limit = Duration::from_secs(20) + 2 * began.elapsed();
    let began = Instant::now();
    let result = Lab::new().limit(limit).run("echo begun; while :; do :; done").unwrap();
    assert_eq!((result.status, result.timed_out, result.output.as_str()), (TIMED_OUT, true, "begun\n"));
    assert!(began.elapsed() >= limit);
}

#[test]
fn a_lab_that_dies_is_an_error_with_its_kernels_last_words() {
    let error = Lab::new().run("echo c > /proc/sysrq-trigger; sleep 60").unwrap_err().to_string();
    assert!(error.lines().next().unwrap().contains("Kernel panic - not syncing"), "{error}");
}

#[test]
fn kvm_works_on_each_host_kernel_with_nested_and_with_shadow_paging() {
    let dir = with_probe();
    for host in ["6.1", "6.12", "7.2"] {
        for (args, npt) in [("", "Y"), ("npt=0", "N")] {
            let lab = Lab::new().host(host).kvm_args(args).extra(dir.path());
            let command = "uname -r; cat /sys/module/kvm_amd/parameters/npt; /extra/kvm_probe";
            let result = lab.run(command).unwrap();
            let release = guest_kernels::ensure(host).unwrap().release;
            assert_eq!(result.output, format!("{release}\n{npt}\nkvm: 40 + 2 = 42\n"), "host {host} {args}");
        }
    }
}

#[test]
fn the_lab_has_what_its_users_count_on() {
    let checks = [
        "command -v vmm",
        "ping -c 1 127.0.0.1",
        "grep -q '^tmpfs /tmp ' /proc/mounts",
        "test -s /guests/6.1/vmlinuz -a -s /guests/6.12/vmlinux -a -s /guests/7.2/initrd",
        "test -d /extra",
        "ip tuntap add tap0 mode tap && ip link set tap0 up",
        "ip netns add far && ip link add near type veth peer name far netns far",
        "truncate -s 16M disk && mkfs.ext4 -q disk && e2fsck -fn disk && mkdir m && mount -o loop disk m",
        "test \"$(sqlite3 :memory: 'select 6 * 7')\" = 42",
        "tcpdump --version && ss -tan && iperf3 --version",
        "test -b /lab/disk",
    ];
    let script: String =
        checks.iter().map(|check| format!("({check}) >/dev/null 2>&1 || echo \"{check}\"\n")).collect();
    assert_eq!(Lab::new().run(&script).unwrap().output, "", "these failed");
}
