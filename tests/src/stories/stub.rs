//! Stories of the restore stub.

use super::keeping::{follows, keep};
use super::refusing::{refused, vmm_with};
use crate::guests::Guest;
use crate::oracle;
use crate::stub_rate;
use crate::vm::{TestVm, vmm};
use anyhow::{Context, Result, anyhow, ensure};
use snapshot_format::{Image, NOTES_MAX, Notes, image};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Fast restart by way of the stub: it reports what is in the file, the guest goes on with the next number, the machine is the one
/// that was saved, and one that has lost a bit anywhere is not started.
///
/// # Errors
/// Any of this is not so.
pub fn by_stub(guest: &Guest, dir: &Path) -> Result<()> {
    let (file, again) = (dir.join("snapshot"), dir.join("again"));
    let mut vm = TestVm::start(&guest.run_args())?;
    vm.wait_for(guest.proof)?;
    (0..3).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    let before = keep(guest, &mut vm, &file)?;

    let mut paused = TestVm::restore_with(&file, &["--via-stub", "--paused"])?;
    let report = paused.wait_for("stub: ")?;
    is_of(&report, &file)?;
    paused.snapshot_and_stop(&again)?;
    oracle::same_machine(&file, &again).with_context(|| guest.name.clone())?;

    let mut restored = TestVm::restore_with(&file, &["--via-stub"])?;
    let after = guest.beat(&restored.wait_for(guest.pulse)?)?;
    // Ticks come one by one, what else guests count is more between two lines.
    let goes_on = if guest.pulse == "tick " { follows(before, after) } else { after > before };
    ensure!(goes_on, "{}: {before} before, {after} after", guest.name);
    restored.wait_for(guest.pulse)?;
    if let Some(told) = boot_id(&vm) {
        restored.wait_for(&told)?;
    }
    println!("{}: {report}; {before} before, {after} after", guest.name);
    a_flipped_byte_is_refused(&file)
}

/// How fast the stub is beside the host.
///
/// # Errors
/// No snapshot, or no KVM.
pub fn stub_rate(guest: &Guest, dir: &Path) -> Result<()> {
    let file = dir.join("snapshot");
    let mut vm = TestVm::start(&guest.run_args())?;
    (0..2).try_for_each(|_| vm.wait_for(guest.pulse).map(drop))?;
    vm.snapshot_and_stop(&file)?;
    println!("{}: {}", guest.name, stub_rate::measure(&file)?);
    Ok(())
}

/// The first line in which the guest tells its boot id, if it does; the last may have been cut short by the snapshot.
fn boot_id(vm: &TestVm) -> Option<String> {
    vm.seen().iter().find(|line| line.starts_with("boot_id ")).cloned()
}

/// The stub has counted all pages, and its digest is the one of the file.
fn is_of(report: &str, file: &Path) -> Result<()> {
    let path = file.to_str().context("path")?;
    let json: serde_json::Value = serde_json::from_slice(&vmm(["inspect", "--json", path])?.stdout)?;
    let word = |name: &str| {
        let words = report.split(' ').filter_map(|word| word.split_once('='));
        words.filter(|(key, _)| *key == name).map(|(_, value)| value).next().context("a word is missing")
    };
    let number = |name: &str| Ok::<u64, anyhow::Error>(word(name)?.parse()?);
    let pages = json["ram"]["bytes"].as_u64().context("no RAM")? / 4096;
    ensure!(number("pages")? + number("zero_pages")? == pages, "{report}: not {pages} pages");
    ensure!((1..=number("pages")?).contains(&number("runs")?), "{report}: so many runs?");
    ensure!(
        json["ram"]["digest"] == word("digest")?,
        "{report}: the digest is not {}",
        json["ram"]["digest"]
    );
    ensure!(report.ends_with(" go"), "{report}: no go");
    Ok(())
}

/// One byte in each part of the file, RAM's first data and its last byte included: the stub names the check that found it.
fn a_flipped_byte_is_refused(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let parts = parts(path)?;
    ensure!(parts.len() == 9, "{parts:?}");
    for (part, at) in parts {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 4], at)?;
        let expected = fault_before_ram(path)?.unwrap_or_else(|| "RAM chunk at GPA".to_owned());
        let name = path.to_str().context("path")?;
        let words = [name, "the restore stub refuses it", &expected];
        refused(vmm_with(["restore", "--via-stub", name]), 1, &words).context(part)?;
        file.write_all_at(&byte, at)?;
    }
    Ok(())
}

/// A byte of each part of a file, by name.
fn parts(path: &Path) -> Result<Vec<(&'static str, u64)>> {
    let (head, len) = head(path)?;
    let layout = image::layout(&head, len).map_err(|fault| anyhow!("{fault}"))?;
    let notes = Notes::find(&head, &layout).map_err(|fault| anyhow!("{fault}"))?;
    let middle = |part: &[u8]| (part.as_ptr() as usize - head.as_ptr() as usize + part.len() / 2) as u64;
    Ok(vec![
        ("ELF header", 18),
        ("program headers", layout.headers_end - 8),
        ("registers", layout.notes.start + 100),
        ("fixed header", middle(notes.header_bytes)),
        ("manifest", middle(notes.manifest)),
        ("machine state", middle(notes.state)),
        ("chunk table", middle(notes.table)),
        ("RAM", first_data(path)?),
        ("the last byte", len - 1),
    ])
}

/// What the stub's parser says here of all but RAM.
fn fault_before_ram(path: &Path) -> Result<Option<String>> {
    let (head, len) = head(path)?;
    let checked = image::layout(&head, len)
        .and_then(|layout| Notes::find(&head, &layout).and_then(|notes| Image::new(layout, notes)));
    Ok(checked.err().map(|fault| fault.to_string()))
}

/// All before RAM and some of that, and the file's length.
fn head(path: &Path) -> Result<(Vec<u8>, u64)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut head = vec![0; len.min(2 * NOTES_MAX) as usize];
    file.read_exact_at(&mut head, 0)?;
    Ok((head, len))
}

/// Offset of the first byte of RAM that is not zero.
fn first_data(path: &Path) -> Result<u64> {
    let snapshot = vmm::load::open(path)?;
    let (file, mut page) = (File::open(path)?, [0; 4096]);
    for mapped in snapshot.ram() {
        for at in (mapped.offset..mapped.offset + mapped.range.len).step_by(4096) {
            file.read_exact_at(&mut page, at)?;
            if let Some(byte) = page.iter().position(|byte| *byte != 0) {
                return Ok(at + byte as u64);
            }
        }
    }
    anyhow::bail!("RAM is empty")
}
