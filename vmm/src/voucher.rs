//! A voucher: what vCPUs were promised has been held against what this host's KVM offers, and it is all there.
//!
//! In: the vCPUs' states. Out: a value that only this host makes, while it runs, for these promises. Holds: a snapshot that brings it
//! back need not be held against the host again, which costs KVM up to half a millisecond (`KVM_GET_SUPPORTED_CPUID` executes `cpuid`
//! many times, and each is an exit where the host is a guest itself).
//!
//! The kernel makes the node `/dev/kvm` anew each time that a module of KVM's is loaded, with whatever parameters: the time at which it was
//! made tells one start of the host from another, and one load from another. A node that was made by hand tells nothing.
//!
//! Whoever forges a voucher makes a guest believe in features that are not there, as whoever forges its state can in any case.

use crate::vcpu_state::VcpuState;
use kvm_bindings::kvm_cpuid_entry2;
use rustix::fs::{Stat, major, minor, stat};
use serde::{Deserialize, Serialize};
use std::arch::x86_64::__cpuid;
use std::fs;
use xxhash_rust::xxh3::xxh3_64;

const NODE: &str = "/dev/kvm";
/// The file system that the kernel makes nodes in by itself.
const KERNELS: &str = "devtmpfs";

/// A host at work, and what it was found to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voucher {
    /// Of `/dev/kvm`: its inode, and when that was changed last, in seconds and nanoseconds since 1970.
    node: (u64, i64, u64),
    /// CPUID leaf 1, EAX: family, model, stepping.
    processor: u32,
    /// XXH3 of all that the vCPUs were promised.
    promised: u64,
}

impl Voucher {
    /// This host's for vCPUs that it has run. None on a host that doesn't tell one start from another.
    pub fn give(vcpus: &[VcpuState]) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let node = stat(NODE).ok().filter(|node| is_the_kernels(node, &mounts))?;
        Some(Self::with(&node, vcpus))
    }

    /// Whether this host has given it, for these vCPUs.
    pub fn holds_for(&self, vcpus: &[VcpuState]) -> bool {
        stat(NODE).is_ok_and(|node| *self == Self::with(&node, vcpus))
    }

    fn with(node: &Stat, vcpus: &[VcpuState]) -> Self {
        let promised: Vec<_> = vcpus.iter().flat_map(|vcpu| &vcpu.cpuid).flat_map(bytes).collect();
        let node = (node.st_ino, node.st_ctime, node.st_ctime_nsec);
        Self { node, processor: __cpuid(1).eax, promised: xxh3_64(&promised) }
    }
}

/// Whether it is in a file system that the kernel fills by itself (`proc_pid_mountinfo(5)`).
fn is_the_kernels(node: &Stat, mounts: &str) -> bool {
    let device = format!("{}:{}", major(node.st_dev), minor(node.st_dev));
    mounts.lines().any(|line| {
        let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next());
        line.split(' ').nth(2) == Some(&device) && kind == Some(KERNELS)
    })
}

fn bytes(entry: &kvm_cpuid_entry2) -> [u8; 28] {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
    let mut bytes = [0; 28];
    for (place, word) in bytes.chunks_exact_mut(4).zip([function, index, flags, eax, ebx, ecx, edx]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_an_entry_counts() {
        let entry = kvm_cpuid_entry2 {
            function: 1,
            index: 2,
            flags: 3,
            eax: 4,
            ebx: 5,
            ecx: 6,
            edx: 7,
            ..Default::default()
        };
        let words: Vec<_> = bytes(&entry).chunks(4).map(|word| word[0]).collect();
        assert_eq!(words, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_voucher_is_for_one_node() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            stat(&path).unwrap()
        });
        assert_eq!(Voucher::with(&one, &[]), Voucher::with(&one, &[]));
        assert_ne!(Voucher::with(&one, &[]), Voucher::with(&other, &[]));
    }

    #[test]
    fn a_node_that_was_made_by_hand_tells_nothing() {
        let node = stat("/proc/self").unwrap();
        let device = format!("{}:{}", major(node.st_dev), minor(node.st_dev));
        let mounts = |kind| {
            format!("24 1 0:999 / / rw - ext4 /dev/x rw\n25 24 {device} / /dev rw shared:1 - {kind} x rw\n")
        };
        assert!(is_the_kernels(&node, &mounts("devtmpfs")));
        assert!(!is_the_kernels(&node, &mounts("tmpfs")));
        assert!(!is_the_kernels(&node, "24 1 0:999 / / rw - devtmpfs x rw\n"));
    }
}
