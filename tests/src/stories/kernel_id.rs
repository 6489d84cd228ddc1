//! Stories of whose kernel a snapshot is.

use super::refusing::{refused, vmm_with};
use crate::guests::Guest;
use crate::vm::{TestVm, vmm};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// The header of a GNU build id of 20 bytes, and its owner (ELF note: lengths of owner and descriptor, type).
const NOTE: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
/// Of nobody.
const OTHER: &str = "0123456789abcdef0123456789abcdef01234567";

/// The snapshot of a kernel that was booted from a bzImage, which hides its build id, knows it all the same; by release or build
/// id the expected kernel is taken, and any other is refused with both named.
///
/// # Errors
/// The build id is another, or the wrong one is refused.
pub fn knows_its_kernel(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    let ready = vm.wait_for("ready kernel=")?;
    vm.wait_for(guest.pulse)?;
    vm.snapshot_and_stop(&file)?;

    let path = file.to_str().context("path")?;
    let json: serde_json::Value = serde_json::from_slice(&vmm(["inspect", "--json", path])?.stdout)?;
    let found = json["kernel_build_id"].as_str().context("inspect knows no build id")?;
    let ids = build_ids(&guest.kernel().with_file_name("vmlinux"))?;
    ensure!(
        ids.iter().any(|id| id == found),
        "{}: build id {found}, and its vmlinux has {ids:?}",
        guest.name
    );
    let release =
        ready.split("kernel=").nth(1).and_then(|rest| rest.split(' ').next()).context("no release")?;

    for name in [release, found] {
        let mut restored = TestVm::restore_with(&file, &["--expect-kernel", name])?;
        restored.wait_for(guest.pulse)?;
    }
    for name in [OTHER, "5.10"] {
        let args = ["restore", path, "--expect-kernel", name];
        refused(vmm_with(args), 1, &[path, release, found, name])?;
    }
    Ok(())
}

/// The kernel's, and those of the vDSOs in it.
fn build_ids(vmlinux: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(vmlinux).with_context(|| vmlinux.display().to_string())?;
    let notes = bytes.windows(NOTE.len() + 20).filter(|window| window.starts_with(NOTE));
    Ok(notes.map(|note| vmm::kernel_id::hex(&note[NOTE.len()..])).collect())
}
