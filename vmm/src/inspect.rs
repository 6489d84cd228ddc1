//! What a snapshot is, for a person or for a program; and whether every byte of it is what was written.
//!
//! In: a verified snapshot. Out: a table, JSON, or a verdict with a progress bar. Holds: nothing is restored, and no KVM
//! is needed.

use crate::complaint;
use crate::disk::DiskRecord;
use crate::kernel_id::{KernelId, hex};
use crate::load::{self, LoadError};
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;
use snapshot::{
    Chain, GenerationId, HostNeed, NeedValue, RamError, RamRange, SealKey, Snapshot, UnverifiedSnapshot,
};
use std::path::{Path, PathBuf};

/// What `vmm inspect --json` prints.
#[derive(Debug, Serialize)]
pub struct Description {
    /// Format version.
    pub format: u32,
    /// Of this snapshot.
    pub generation: GenerationId,
    /// The snapshot it is a difference to.
    pub parent: Option<GenerationId>,
    /// All the snapshots that it needs, its parent first.
    pub needs: Vec<Needed>,
    /// Why they can't all be had, if so; then `needs` is empty.
    pub broken: Option<String>,
    /// Nanoseconds since 1970-01-01 UTC.
    pub created_unix_ns: u64,
    /// The program that wrote it.
    pub writer: String,
    /// Whether it was written with a key. Whose that was, `vmm verify --key` tells.
    pub sealed: bool,
    /// The machine's name.
    pub name: String,
    /// Release of the guest's kernel.
    pub kernel_release: Option<String>,
    /// Version text of the guest's kernel.
    pub kernel_version: Option<String>,
    /// Build id of the guest's kernel, in hexadecimal: of its file, or as the running kernel has it.
    pub kernel_build_id: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM, in bytes.
    pub ram: Ram,
    /// The machine's devices.
    pub devices: Vec<String>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// What a host must offer.
    pub host_needs: Vec<HostNeed>,
    /// MSRs saved and skipped for vCPU 0.
    pub msrs: Msrs,
    /// Names of the state's sections, with their bytes.
    pub sections: Vec<(String, usize)>,
}

/// A snapshot that another needs.
#[derive(Debug, Serialize)]
pub struct Needed {
    /// Its id.
    pub generation: GenerationId,
    /// Where it is.
    pub path: PathBuf,
    /// RAM in its file, in bytes.
    pub resident: u64,
}

/// A snapshot's RAM.
#[derive(Debug, Serialize)]
pub struct Ram {
    /// All of it.
    pub bytes: u64,
    /// What is in the file.
    pub resident: u64,
    /// What is zero, and a hole.
    pub zero: u64,
    /// What is as its parent has it.
    pub unchanged: u64,
    /// XXH3 of the digests of its chunks, in hexadecimal; the restore stub prints the same. Of a difference, of its pages, and of which they are.
    pub digest: String,
    /// Where it is in the guest.
    pub ranges: Vec<RamRange>,
}

/// A disk, as the snapshot knows it.
#[derive(Debug, Serialize)]
pub struct Disk {
    /// What its owner calls it.
    pub id: String,
    /// Where it was; none if it had no name.
    pub path: Option<PathBuf>,
    /// Bytes.
    pub bytes: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Digest of its bytes in hexadecimal, if it was taken.
    pub digest: Option<String>,
    /// Name of its copy beside the snapshot, if it was kept.
    pub kept: Option<String>,
}

/// How many MSRs a vCPU's state has.
#[derive(Debug, Serialize)]
pub struct Msrs {
    /// With their values.
    pub saved: usize,
    /// On the host's list, but not readable there.
    pub skipped: Vec<u32>,
}

/// Reads a snapshot's description.
///
/// # Errors
/// A file that is no whole snapshot of a machine.
pub fn describe(path: &Path) -> Result<Description, LoadError> {
    let snapshot = UnverifiedSnapshot::open(path)?.verify_link()?;
    let state = load::state(&snapshot)?;
    let (needs, broken) = match Chain::open(path) {
        Ok(chain) => (chain.links()[1..].iter().map(needed).collect(), None),
        Err(error) => (Vec::new(), Some(complaint::one_line(&error))),
    };
    let manifest = snapshot.manifest();
    let about = &manifest.about;
    let msrs = &state.vcpus[0].msrs;
    let kernel = KernelId::of(&snapshot);
    Ok(Description {
        format: snapshot::FORMAT_VERSION,
        generation: about.generation,
        parent: manifest.parent,
        needs,
        broken,
        created_unix_ns: about.created_unix_ns,
        writer: about.writer.clone(),
        sealed: snapshot.is_sealed(),
        name: state.shape.name.clone(),
        kernel_release: about.kernel.release.clone(),
        kernel_version: about.kernel.version.clone(),
        kernel_build_id: kernel.build_id.as_deref().map(hex),
        vcpus: manifest.vcpus,
        ram: ram(&snapshot),
        devices: about.devices.clone(),
        disks: load::disks(&snapshot)?.into_iter().map(disk).collect(),
        host_needs: about.host_needs.clone(),
        msrs: Msrs { saved: msrs.saved.len(), skipped: msrs.skipped.clone() },
        sections: snapshot.sections().map(|section| (section.name.to_owned(), section.bytes.len())).collect(),
    })
}

/// The table that a person reads.
pub fn table(description: &Description) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("snapshot", description.generation.to_string());
    if let Some(parent) = description.parent {
        row("parent", parent.to_string());
    }
    for Needed { generation, path, resident } in &description.needs {
        let path = complaint::printable(&path.display().to_string());
        row("needs", format!("{generation}: {path}, {} in the file", mib(*resident)));
    }
    if let Some(why) = &description.broken {
        row("broken", complaint::printable(why));
    }
    row("written", format!("{} by {}", time(description.created_unix_ns), description.writer));
    let sealed = if description.sealed { "with a key: vmm verify --key tells whether yours" } else { "no" };
    row("sealed", sealed.to_owned());
    row("machine", format!("{}, {} vCPU{}", description.name, description.vcpus, plural(description.vcpus)));
    row("kernel", description.kernel_version.clone().unwrap_or_else(|| "unknown".to_owned()));
    if let Some(id) = &description.kernel_build_id {
        row("build id", id.clone());
    }
    let ram = &description.ram;
    let unchanged = description.parent.map(|_| format!(", {} unchanged", mib(ram.unchanged)));
    let parts =
        format!("{} in the file, {} zero{}", mib(ram.resident), mib(ram.zero), unchanged.unwrap_or_default());
    row("RAM", format!("{}: {parts}", mib(ram.bytes)));
    for range in &ram.ranges {
        row("", format!("{:#012x}..{:#012x}", range.gpa, range.gpa + range.len));
    }
    row("", format!("digest {}", ram.digest));
    row("devices", description.devices.join(", "));
    for disk in &description.disks {
        row("disk", disk_line(disk));
    }
    let needs: Vec<_> = description.host_needs.iter().map(need).collect();
    row("host needs", needs.join(", "));
    row("MSRs", format!("{} saved, {} skipped", description.msrs.saved, description.msrs.skipped.len()));
    let state: usize = description.sections.iter().map(|(_, len)| len).sum();
    row("state", format!("{} sections, {} KiB", description.sections.len(), state.div_ceil(1024)));
    table
}

/// Reads every byte of a snapshot, and of those that it needs; a bar shows the progress on a terminal. Returns the bytes of RAM checked.
///
/// # Errors
/// What is damaged, and where; what was not written with the key, if there is one.
pub fn verify(path: &Path, key: Option<&SealKey>) -> Result<u64, VerifyFileError> {
    let chain = load::open_own_chain(path, key)?;
    load::state(chain.top())?;
    Ok(verify_ram(&chain)?)
}

/// Reads all RAM of a snapshot, and of those that it needs; a bar shows the progress on a terminal. Returns the bytes of RAM checked.
///
/// # Errors
/// The first chunk that is not what was saved.
pub fn verify_ram(chain: &Chain) -> Result<u64, RamError> {
    let bytes = chain.ram_bytes();
    let bar = progress_bar("checking", bytes);
    let checked = chain.verify_ram(&mut |done, _| bar.set_position(done));
    bar.finish_and_clear();
    checked.map(|_| bytes)
}

/// Why a snapshot is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum VerifyFileError {
    /// Outside RAM.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// In RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// A bar over bytes, drawn on standard error if that is a terminal.
pub fn progress_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}");
    let bar = ProgressBar::new(bytes).with_prefix(what);
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

/// What is in the file is what `SEEK_DATA` finds there; on a file system without holes that is everything.
fn ram(snapshot: &Snapshot) -> Ram {
    let bytes = snapshot.manifest().ram.bytes;
    let own = snapshot.ram_bytes();
    let (resident, unchanged) = (resident(snapshot), bytes - own);
    let digest = format!("{:016x}", snapshot.ram_digest());
    let ranges = snapshot.manifest().ram.ranges.clone();
    Ram { bytes, resident, zero: own.saturating_sub(resident), unchanged, digest, ranges }
}

fn resident(snapshot: &Snapshot) -> u64 {
    snapshot.ram_bytes() - snapshot.zero_bytes().unwrap_or(0)
}

fn needed(link: &Snapshot) -> Needed {
    let generation = link.manifest().about.generation;
    Needed { generation, path: link.path().to_owned(), resident: resident(link) }
}

fn disk(record: DiskRecord) -> Disk {
    let DiskRecord { id, path, size, read_only, digest, kept, .. } = record;
    let (digest, kept) = (digest.map(|digest| digest.to_string()), kept.map(|kept| kept.file));
    Disk { id, path, bytes: size, read_only, digest, kept }
}

fn disk_line(disk: &Disk) -> String {
    let path = disk.path.as_deref().map_or("no name".into(), |path| path.display().to_string());
    let mut parts = vec![format!("`{}`: {}", disk.id, mib(disk.bytes)), path];
    parts.extend(disk.read_only.then(|| "read-only".to_owned()));
    parts.extend(disk.digest.as_ref().map(|digest| format!("digest {digest}")));
    parts.extend(disk.kept.as_ref().map(|kept| format!("kept as {kept}")));
    complaint::printable(&parts.join(", "))
}

fn need(need: &HostNeed) -> String {
    match &need.value {
        NeedValue::Number(value) => format!("{} {value}", need.name),
        NeedValue::Text(value) => format!("{} {value}", need.name),
    }
}

fn mib(bytes: u64) -> String {
    if bytes < 1 << 20 {
        format!("{} KiB", bytes.div_ceil(1 << 10))
    } else {
        format!("{} MiB", bytes.div_ceil(1 << 20))
    }
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn time(unix_ns: u64) -> String {
    let time = Timestamp::from_nanosecond(i128::from(unix_ns));
    time.map_or_else(|_| "at an unknown time".to_owned(), |time| time.strftime("%F %T UTC").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(time(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(time(1_795_212_855_000_000_000), "2026-11-20 22:14:15 UTC");
    }
}
