//! Programs from Debian's archive, run without installing them.
//!
//! In: a suite and package names. Out: a directory with those packages and all they depend on, and commands that run a
//! program of it with its own libraries. Holds: the machine's own packages are neither used nor changed, so the programs
//! are the same everywhere; needs no root.

use crate::apt::Archive;
use crate::cache;
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where Debian's releases put the dynamic loader, newest first.
const LOADERS: [&str; 3] = [
    "usr/lib64/ld-linux-x86-64.so.2",
    "lib64/ld-linux-x86-64.so.2",
    "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
];

/// Unpacked packages.
#[derive(Clone, Debug)]
pub struct Packages {
    root: PathBuf,
}

impl Packages {
    /// Packages that were unpacked there.
    pub(crate) fn at(root: &Path) -> Packages {
        Packages { root: root.to_owned() }
    }

    /// These packages of a suite, fetched into the cache as `name` unless they are there.
    ///
    /// # Errors
    /// The archive can't be reached, or a package isn't in it.
    pub fn ensure(name: &str, suite: &str, packages: &[&str]) -> Result<Packages> {
        let root = cache::cache_dir()?.join(format!("{name}-{suite}"));
        cache::publish(&root, |dir| {
            eprintln!("fetching {} from Debian's {suite}", packages.join(", "));
            unpack(suite, packages, dir).map(drop).with_context(|| format!("cannot fetch {name}"))
        })?;
        Ok(Packages { root })
    }

    /// A path in the packages.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// A command that runs a program of the packages, `usr/bin/x` for example.
    ///
    /// # Errors
    /// The packages have no dynamic loader.
    pub fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.loader_command()?;
        command.arg(self.root.join(program));
        Ok(command)
    }

    /// The dynamic loader.
    ///
    /// # Errors
    /// The packages have none.
    pub fn loader(&self) -> Result<PathBuf> {
        let loader = LOADERS.iter().map(|path| self.root.join(path)).find(|path| path.is_file());
        loader.with_context(|| format!("no dynamic loader in {}", self.root.display()))
    }

    /// The shared libraries that a program needs, each by the name that it needs them under.
    ///
    /// # Errors
    /// The loader can't be run, or the packages lack one of them.
    pub fn libraries(&self, program: &Path) -> Result<Vec<(String, PathBuf)>> {
        let mut list = self.loader_command()?;
        let output = run(list.arg("--list").arg(program))?;
        Ok(parse_libraries(&String::from_utf8_lossy(&output.stdout)))
    }

    /// The loader, told where the packages' libraries are.
    fn loader_command(&self) -> Result<Command> {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| self.root.join(path));
        let libraries: Vec<&OsStr> = libraries.iter().map(|path| path.as_os_str()).collect();
        let mut command = Command::new(self.loader()?);
        command.arg("--library-path").arg(libraries.join(OsStr::new(":")));
        Ok(command)
    }
}

/// Downloads these packages of a suite with all they depend on, unpacks them into `dir` without running anything of theirs, and
/// returns what they are: `criu_4.2.1-1_amd64` for example, in order.
pub(crate) fn unpack(suite: &str, packages: &[&str], dir: &Path) -> Result<Vec<String>> {
    let archive = Archive::open(&[suite])?;
    let debs = dir.join("debs");
    download(&archive, packages, &debs)?;
    let mut unpacked = Vec::new();
    for deb in fs::read_dir(&debs)? {
        let deb = deb?.path();
        if deb.extension() == Some(OsStr::new("deb")) {
            run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
            unpacked.extend(deb.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    fs::remove_dir_all(&debs).with_context(|| format!("cannot remove {}", debs.display()))?;
    unpacked.sort();
    Ok(unpacked)
}

/// Downloads the packages and, because apt is told that nothing is installed, all they depend on.
fn download(archive: &Archive, packages: &[&str], debs: &Path) -> Result<()> {
    let status = debs.join("status");
    fs::create_dir_all(debs.join("partial")).with_context(|| format!("cannot create {}", debs.display()))?;
    fs::write(&status, "").with_context(|| format!("cannot write {}", status.display()))?;
    let mut apt = archive.apt("apt-get");
    apt.arg("-o").arg(format!("Dir::State::status={}", status.display()));
    apt.arg("-o").arg(format!("Dir::Cache::archives={}", debs.display()));
    apt.args(["-o", "Dir::Etc::preferences=/dev/null", "-o", "Dir::Etc::preferencesparts=/dev/null"]);
    apt.args(["-o", "Debug::NoLocking=true", "-o", "APT::Keep-Downloaded-Packages=true"]);
    run(apt.args(["install", "--download-only", "--no-install-recommends", "-qq", "-y"]).args(packages))?;
    Ok(())
}

/// The lines `name => path (address)` of the loader's listing.
fn parse_libraries(listing: &str) -> Vec<(String, PathBuf)> {
    let lines = listing.lines().filter_map(|line| line.trim().split_once(" => "));
    let libraries =
        lines.filter_map(|(name, rest)| Some((name.to_owned(), rest.rsplit_once(" (")?.0.into())));
    libraries.collect()
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// It can't be run, or fails: its first complaint in apt's form, else its last line.
pub fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let error = stderr.lines().find(|line| line.starts_with("E:")).or(stderr.lines().last());
        bail!("{program} failed ({}): {}", output.status, error.unwrap_or("it didn't say why"));
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_listing_is_read() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /a b/libc.so.6 (0x00007f)\n\t/lib64/ld.so (0x7f)\n";
        assert_eq!(parse_libraries(listing), [("libc.so.6".to_owned(), PathBuf::from("/a b/libc.so.6"))]);
    }
}
