//! What this processor has that programs use.
//!
//! In: the processor, and what another one had. Out: the first thing that is missing here. Holds: a feature counts only if the
//! kernel has switched on the registers that it needs, and the list is the same whatever the kernel calls them.
//!
//! Programs look once at what there is, when they start. CRIU can compare processors too (`--cpu-cap`); it ends by a signal then if
//! the processor has no brand string, as in many guests, and does not say which feature is missing.

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// A processor, as a program sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Processor {
    /// Names, as the Rust compiler spells them.
    pub(crate) features: Vec<String>,
    /// Bytes that `XSAVE` writes: a program that saw less has made less room.
    pub(crate) registers: u32,
}

macro_rules! present {
    ($($name:tt)*) => { [$(($name, std::arch::is_x86_feature_detected!($name))),*] };
}

impl Processor {
    /// The one this program runs on.
    pub(crate) fn here() -> Processor {
        let known = present!(
            "fxsr" "sse" "sse2" "sse3" "ssse3" "sse4.1" "sse4.2" "sse4a" "popcnt" "cmpxchg16b" "movbe" "lzcnt" "tbm"
            "bmi1" "bmi2" "adx" "aes" "pclmulqdq" "sha" "gfni" "rdrand" "rdseed" "rtm"
            "xsave" "xsaveopt" "xsavec" "avx" "avx2" "f16c" "fma" "vaes" "vpclmulqdq" "avxvnni" "avxifma" "avxvnniint8"
            "avxvnniint16" "avxneconvert" "sha512" "sm3" "sm4"
            "avx512f" "avx512cd" "avx512bw" "avx512dq" "avx512vl" "avx512ifma" "avx512vbmi" "avx512vbmi2"
            "avx512vnni" "avx512bitalg" "avx512vpopcntdq" "avx512bf16" "avx512fp16" "avx512vp2intersect"
        );
        let features = known.into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_owned());
        Processor { features: features.collect(), registers: registers() }
    }

    /// Why a program that has looked at `other` can't go on with this one.
    pub(crate) fn lacks(&self, other: &Processor) -> Option<String> {
        let missing: Vec<&str> =
            other.features.iter().filter(|name| !self.features.contains(name)).map(String::as_str).collect();
        if !missing.is_empty() {
            let all = missing.join(", ");
            return Some(format!("this processor has no {all}, which that of the processes had"));
        }
        (self.registers != other.registers).then(|| {
            format!(
                "this processor has {} bytes of registers to save, that of the processes had {}",
                self.registers, other.registers
            )
        })
    }
}

/// What is switched on: CPUID leaf 0xd, subleaf 0, EBX (Intel SDM volume 1, 13.2). Nothing without XSAVE.
fn registers() -> u32 {
    if !std::arch::is_x86_feature_detected!("xsave") || __cpuid(0).eax < 0xd {
        return 0;
    }
    __cpuid_count(0xd, 0).ebx
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(features: &[&str], registers: u32) -> Processor {
        Processor { features: features.iter().map(|&name| name.to_owned()).collect(), registers }
    }

    #[test]
    fn more_is_no_obstacle_and_less_is_named() {
        let old = processor(&["sse2", "avx"], 832);
        let new = processor(&["sse2", "avx", "avx2", "fma"], 832);
        assert_eq!(new.lacks(&old), None);
        let said = old.lacks(&new).unwrap();
        assert!(said.contains("has no avx2, fma,"), "{said}");
    }

    #[test]
    fn registers_that_a_program_made_no_room_for_are_an_obstacle() {
        let said = processor(&["avx"], 2696).lacks(&processor(&["avx"], 832)).unwrap();
        assert!(said.contains("has 2696 bytes") && said.contains("had 832"), "{said}");
    }

    #[test]
    fn this_one_lacks_nothing_that_it_has() {
        let here = Processor::here();
        assert!(here.features.contains(&"sse2".to_owned()), "{here:?}");
        assert_eq!(here.lacks(&here), None);
    }
}
