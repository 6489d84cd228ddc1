//! What is fetched: which package, of which version, with which SHA-256.
//!
//! In: nothing. Out: constant tables. Holds: each SHA-256 is that of the `.deb` in Debian's archive, so a file that
//! differs is refused, whoever signed it. To move a pin, copy what `guest-kernels fetch` prints when a version is gone.

use anyhow::{Result, bail};

/// A stock kernel as Debian ships it.
#[derive(Debug)]
pub struct KernelPin {
    /// The short name that everything here uses.
    pub name: &'static str,
    /// The suite of Debian's archive that has it.
    pub suite: &'static str,
    /// The Debian version, the same for all its packages.
    pub version: &'static str,
    /// What `uname -r` says; the package names end with it.
    pub release: &'static str,
    /// The packages that hold the image, the modules and the list of what is built in.
    pub packages: &'static [KernelPackage],
}

/// One package of a kernel; its name is `stem` followed by the release.
#[derive(Debug)]
pub struct KernelPackage {
    /// The name up to the release.
    pub stem: &'static str,
    /// SHA-256 of the `.deb`, in hexadecimal.
    pub sha256: &'static str,
}

/// A package with a name that stays.
#[derive(Debug)]
pub struct PackagePin {
    /// The package's name.
    pub name: &'static str,
    /// The suite of Debian's archive that has it.
    pub suite: &'static str,
    /// The Debian version.
    pub version: &'static str,
    /// SHA-256 of the `.deb`, in hexadecimal.
    pub sha256: &'static str,
}

/// The package whose dependency names a suite's current kernel.
pub const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// The guest kernels, oldest first. From 7.2 on Debian splits the image from the modules.
pub const KERNELS: [KernelPin; 3] = [
    KernelPin {
        name: "6.1",
        suite: "bookworm",
        version: "6.1.176-1",
        release: "6.1.0-50-cloud-amd64",
        packages: &[KernelPackage {
            stem: "linux-image-",
            sha256: "efe19f605b6f54a8352e68d85a629abb2d30b72a085faef603a9152590baa791",
        }],
    },
    KernelPin {
        name: "6.12",
        suite: "trixie",
        version: "6.12.107-1",
        release: "6.12.107+deb13-cloud-amd64",
        packages: &[KernelPackage {
            stem: "linux-image-",
            sha256: "04434ff520f860423eafe4203d986a35682ce73c2f71baa39e988ca0da93ac91",
        }],
    },
    KernelPin {
        name: "7.2",
        suite: "sid",
        version: "7.2.13-1",
        release: "7.2.13+deb14-cloud-amd64",
        packages: &[
            KernelPackage {
                stem: "linux-binary-",
                sha256: "03e41f1c34c16583462f029e81944a85ebcdb78098c258dedfa1cfdd680a27f8",
            },
            KernelPackage {
                stem: "linux-modules-",
                sha256: "97d79546041e3fdfb44dccff180938894d1bf8eb298f091f88539c1b37080bef",
            },
            KernelPackage {
                stem: "linux-base-",
                sha256: "c41b217e1a4e321f5eff028e965ea25f5da8a74cd3683ca7f4bacedc59e0ecc5",
            },
        ],
    },
];

/// The static busybox that every initramfs has.
pub const BUSYBOX: PackagePin = PackagePin {
    name: "busybox-static",
    suite: "bookworm",
    version: "1:1.35.0-4+deb12u1+b1",
    sha256: "3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744",
};

/// The pin with this short name.
///
/// # Errors
/// No kernel has that name.
pub fn kernel(name: &str) -> Result<&'static KernelPin> {
    let Some(pin) = KERNELS.iter().find(|pin| pin.name == name) else {
        let names: Vec<_> = KERNELS.iter().map(|pin| pin.name).collect();
        bail!("no guest kernel is named \"{name}\"; there are {}", names.join(", "));
    };
    Ok(pin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_digest_is_sha256_in_lower_case_hexadecimal() {
        let digests = KERNELS.iter().flat_map(|pin| pin.packages).map(|package| package.sha256);
        for digest in digests.chain([BUSYBOX.sha256]) {
            assert_eq!(digest.len(), 64, "{digest}");
            assert!(digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{digest}");
        }
    }

    #[test]
    fn a_release_belongs_to_its_name() {
        for pin in &KERNELS {
            assert!(pin.version.starts_with(&format!("{}.", pin.name)), "{pin:?}");
            assert!(pin.release.starts_with(&format!("{}.", pin.name)), "{pin:?}");
        }
    }

    #[test]
    fn an_unknown_name_is_told_the_known_ones() {
        let error = kernel("6.9").unwrap_err().to_string();
        assert_eq!(error, "no guest kernel is named \"6.9\"; there are 6.1, 6.12, 7.2");
    }
}
