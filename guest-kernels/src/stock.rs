//! Stock kernels and busybox, from Debian's archive into the cache.
//!
//! In: a short name. Out: paths of the image, the `vmlinux` inside it and the modules. Holds: a pinned package has the
//! SHA-256 of the manifest or is refused; one that replaces a version gone from the archive is announced on stderr with
//! its version and its SHA-256.

use crate::apt::{self, Archive, Record};
use crate::manifest::{self, BUSYBOX, KERNELS, KernelPin};
use crate::{bzimage, cache};
use anyhow::{Context, Result, bail, ensure as check};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel that is in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockKernel {
    /// The short name: `6.1`, `6.12` or `7.2`.
    pub name: String,
    /// What `uname -r` says in it.
    pub release: String,
    /// The bzImage, as packaged.
    pub vmlinuz: PathBuf,
    /// The ELF kernel inside the bzImage (64-bit entry and PVH note; no symbols).
    pub vmlinux: PathBuf,
    /// The directory that the package calls `lib/modules/<release>`: `kernel/`, `modules.builtin`, ….
    pub modules: PathBuf,
    /// The build's configuration.
    pub config: PathBuf,
}

/// A package to fetch: the pinned one, or the archive's current one in its place.
struct Wanted {
    package: String,
    version: String,
    sha256: String,
}

/// The kernel of this name, fetched and unpacked if it is not in the cache yet.
///
/// # Errors
/// No kernel has that name, the archive can't be reached or doesn't have it, or a digest differs from the manifest's.
pub fn ensure(name: &str) -> Result<StockKernel> {
    let pin = manifest::kernel(name)?;
    let dir = cache_entry(&format!("kernel-{}", pin.name), pin.version)?;
    cache::publish(&dir, |dir| fetch_kernel(pin, dir).with_context(|| format!("guest kernel {name}")))?;
    open(pin, &dir)
}

/// The kernel of this pin if the cache has it; nothing is fetched.
///
/// # Errors
/// There is no cache directory, or what is in it is damaged.
pub fn cached(pin: &KernelPin) -> Result<Option<StockKernel>> {
    let dir = cache_entry(&format!("kernel-{}", pin.name), pin.version)?;
    if dir.is_dir() { open(pin, &dir).map(Some) } else { Ok(None) }
}

/// All kernels of the manifest, oldest first, fetched as [`ensure`] does.
///
/// # Errors
/// As [`ensure`].
pub fn all() -> Result<Vec<StockKernel>> {
    KERNELS.iter().map(|pin| ensure(pin.name)).collect()
}

/// The static busybox, fetched if it is not in the cache yet.
///
/// # Errors
/// As [`ensure`].
pub fn busybox() -> Result<PathBuf> {
    let dir = cache_entry(BUSYBOX.name, BUSYBOX.version)?;
    cache::publish(&dir, fetch_busybox)?;
    Ok(dir.join("busybox"))
}

/// Where something of this name and version is kept. Neither `:` nor `,` is welcome in a path that goes on command lines.
fn cache_entry(name: &str, version: &str) -> Result<PathBuf> {
    Ok(cache::cache_dir()?.join(format!("{name}-{version}").replace([':', ','], ".")))
}

fn open(pin: &KernelPin, dir: &Path) -> Result<StockKernel> {
    let release = fs::read_to_string(dir.join("release"))
        .with_context(|| format!("{} is damaged: remove it and fetch again", dir.display()))?;
    Ok(StockKernel {
        name: pin.name.to_owned(),
        release: release.trim_end().to_owned(),
        vmlinuz: dir.join("vmlinuz"),
        vmlinux: dir.join("vmlinux"),
        modules: dir.join("modules"),
        config: dir.join("config"),
    })
}

fn fetch_busybox(dir: &Path) -> Result<()> {
    let archive = Archive::open(&[BUSYBOX.suite])?;
    let pinned = Wanted::new(BUSYBOX.name, BUSYBOX.version, BUSYBOX.sha256);
    let wanted = if available(&archive, &pinned)? {
        pinned
    } else {
        let current = current(&archive, BUSYBOX.name)?;
        replaced(&pinned, Wanted::new(BUSYBOX.name, &current.version, &current.sha256))
    };
    let tree = dir.join("tree");
    unpack(&archive, &wanted, &tree)?;
    let found = find(&tree, &["bin/busybox", "usr/bin/busybox"])?;
    fs::rename(found, dir.join("busybox"))?;
    cache::remove(&tree)
}

fn fetch_kernel(pin: &KernelPin, dir: &Path) -> Result<()> {
    let archive = Archive::open(&[pin.suite])?;
    let (release, wanted) = choose(&archive, pin)?;
    let tree = dir.join("tree");
    for package in &wanted {
        unpack(&archive, package, &tree)?;
    }
    arrange(&tree, &release, dir)?;
    cache::remove(&tree)?;
    fs::write(dir.join("release"), format!("{release}\n"))?;
    let image = fs::read(dir.join("vmlinuz"))?;
    fs::write(dir.join("vmlinux"), bzimage::vmlinux(&image)?).context("cannot write vmlinux")
}

/// The release and packages to take: the pinned ones or, when the archive has moved on, its current ones.
fn choose(archive: &Archive, pin: &KernelPin) -> Result<(String, Vec<Wanted>)> {
    let pinned = pin
        .packages
        .iter()
        .map(|package| Wanted::new(&format!("{}{}", package.stem, pin.release), pin.version, package.sha256));
    let pinned: Vec<Wanted> = pinned.collect();
    if available(archive, &pinned[0])? {
        return Ok((pin.release.to_owned(), pinned));
    }
    let release = current_release(&current(archive, manifest::META_PACKAGE)?)?;
    let replacements = pin.packages.iter().zip(&pinned).map(|(package, gone)| {
        let name = format!("{}{release}", package.stem);
        let current = current(archive, &name)?;
        Ok(replaced(gone, Wanted::new(&name, &current.version, &current.sha256)))
    });
    let replacements = replacements.collect::<Result<_>>()?;
    Ok((release, replacements))
}

/// Whether the archive still has this package in this version.
fn available(archive: &Archive, wanted: &Wanted) -> Result<bool> {
    Ok(archive.record(&wanted.package, Some(&wanted.version))?.is_some())
}

fn current(archive: &Archive, package: &str) -> Result<Record> {
    let record = archive.record(package, None)?;
    record.with_context(|| format!("Debian's archive has no package {package}"))
}

/// The release in the meta package's dependencies, `linux-image-<release> (= …)`.
fn current_release(meta: &Record) -> Result<String> {
    let names = meta.depends.split([',', '|']).filter_map(|dependency| dependency.split_whitespace().next());
    let release = names.filter_map(|name| name.strip_prefix("linux-image-")).next();
    release.map(str::to_owned).with_context(|| format!("no kernel in the dependencies \"{}\"", meta.depends))
}

fn replaced(gone: &Wanted, taken: Wanted) -> Wanted {
    eprintln!(
        "{} {} is gone from Debian's archive; taking {} {} (SHA-256 {})",
        gone.package, gone.version, taken.package, taken.version, taken.sha256
    );
    taken
}

/// Downloads, checks and unpacks one package into `tree`.
fn unpack(archive: &Archive, wanted: &Wanted, tree: &Path) -> Result<()> {
    let deb = archive.download(&wanted.package, Some(&wanted.version))?;
    let found = sha256(&deb)?;
    if found != wanted.sha256 {
        fs::remove_file(&deb)?;
        bail!("{} {} has SHA-256 {found}, expected {}", wanted.package, wanted.version, wanted.sha256);
    }
    let doing = format!("cannot unpack {}", deb.display());
    apt::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(tree), &doing)?;
    fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))
}

/// Moves what is used from where Debian's layouts put it to one place for all kernels.
fn arrange(tree: &Path, release: &str, dir: &Path) -> Result<()> {
    let in_modules = |file: &str| format!("usr/lib/modules/{release}/{file}");
    let moves = [
        ("vmlinuz", [format!("boot/vmlinuz-{release}"), in_modules("vmlinuz")]),
        ("config", [format!("boot/config-{release}"), in_modules("config")]),
        ("modules", [format!("lib/modules/{release}"), format!("usr/lib/modules/{release}")]),
    ];
    for (name, places) in moves {
        fs::rename(find(tree, &places)?, dir.join(name))?;
    }
    check!(
        dir.join("modules/modules.builtin").is_file(),
        "the packages have no modules.builtin for {release}"
    );
    Ok(())
}

fn find(tree: &Path, places: &[impl AsRef<str>]) -> Result<PathBuf> {
    let found = places.iter().map(|place| tree.join(place.as_ref())).find(|path| path.exists());
    found.with_context(|| format!("the package has no {}", places[0].as_ref()))
}

fn sha256(path: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut block = vec![0; 1 << 20];
    loop {
        match io::Read::read(&mut file, &mut block)? {
            0 => return Ok(hex(&digest.finalize())),
            n => digest.update(&block[..n]),
        }
    }
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Wanted {
    fn new(package: &str, version: &str, sha256: &str) -> Wanted {
        Wanted { package: package.to_owned(), version: version.to_owned(), sha256: sha256.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meta_package_names_the_current_release() {
        let depends =
            "linux-base-cloud-amd64 (= 7.2.13-1), linux-image-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)";
        let meta = Record { depends: depends.to_owned(), ..Record::default() };
        assert_eq!(current_release(&meta).unwrap(), "7.2.13+deb14-cloud-amd64");
        assert!(current_release(&Record::default()).is_err());
    }

    #[test]
    fn a_cache_entry_has_no_colon() {
        let path = cache_entry("busybox-static", "1:1.35").unwrap();
        assert_eq!(path.file_name().unwrap(), "busybox-static-1.1.35");
    }

    #[test]
    fn sha256_is_the_one_everybody_knows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "hello world").unwrap();
        let known = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9";
        assert_eq!(sha256(file.path()).unwrap(), known);
    }
}
