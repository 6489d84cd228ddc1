//! The story of a kernel that comes out of a file and takes over another one's machine.

use super::switching::{Life, switch_with};
use crate::guests::Guest;
use crate::vm::TestVm;
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// A kernel that was saved goes on in the place of one that runs, on its disk, and the two take turns from then on. On a machine
/// that is not its own it is refused, and who runs goes on.
///
/// # Errors
/// One of them is not followed by itself, or a refusal names nothing.
pub fn comes_out_of_a_file(guest: &Guest, kept: &Guest, dir: &Path) -> Result<()> {
    let (disk, file) = (dir.join("disk"), dir.join("kept"));
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let with_disk = |guest: &Guest| guest.clone().argument("--disk", &format!("{},id=data", disk.display()));
    let mut life = Life::of(kept);
    let mut vm = TestVm::start(&with_disk(kept).run_args())?;
    life.goes_on(&mut vm)?;
    vm.snapshot_and_stop(&file)?;

    let mut vm = TestVm::start(&with_disk(guest).run_args())?;
    let mut own = Life::of(guest);
    own.goes_on(&mut vm)?;
    let file = file.to_str().context("path")?;
    let refused = |vm: &TestVm, words: &str| {
        let said = vm.ask("switch", &["--to-snapshot", file, "--share-disks"]);
        let said = said.err().context("a kernel takes a machine that is not its own")?.to_string();
        ensure!(said.contains(words) && said.trim().lines().count() == 1, "expected {words}: {said}");
        Ok(())
    };
    let said = vm.ask("switch", &["--to-snapshot", file]).err().context("it gets no disk")?;
    ensure!(said.to_string().contains("`data`") && said.to_string().contains("--share-disks"), "{said:#}");
    own.goes_on(&mut vm).context("after a refusal")?;

    let word = kept.word();
    let to = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    switch_with(&mut vm, kept, &to(&["--to-snapshot", file, "--share-disks", "--as", &word]))?;
    life.goes_on(&mut vm).context("out of its file")?;
    switch_with(&mut vm, guest, &to(&["--to", &guest.word()])).context("nobody wrote the disk")?;
    own.goes_on(&mut vm).context("after the other")?;
    switch_with(&mut vm, kept, &to(&["--to", &word]))?;
    life.goes_on(&mut vm).context("after its sleep")?;
    vm.ask("stop", &["--all"])?;
    vm.wait()?;

    let bare = |disk: &[&str]| {
        let more = disk.chunks(2).fold(guest.clone(), |guest, pair| guest.argument(pair[0], pair[1]));
        TestVm::start(&more.run_args())
    };
    refused(&bare(&[])?, "virtio-blk `data`, and this VM has not")?;
    let more = [with_disk(guest).run_args(), vec!["--rng".to_owned()]].concat();
    refused(&TestVm::start(&more)?, "virtio-rng `rng`, and it has not")?;
    let longer = dir.join("longer");
    std::fs::write(&longer, vec![0; 2 << 20])?;
    refused(&bare(&["--disk", &format!("{},id=data", longer.display())])?, "1048576 bytes")?;
    refused(&bare(&["--disk", &format!("{},id=data,readonly=on", disk.display())])?, "is writable")?;
    std::fs::write(&disk, vec![1; 1 << 20])?;
    refused(&TestVm::start(&with_disk(guest).run_args())?, "disk `data` was written since")
}
