//! Packages out of Debian's archive, without touching this machine's apt.
//!
//! In: suites, and package names with versions. Out: `.deb` files in the cache. Holds: the source list, package lists
//! and downloads are the project's own, below the cache; the mirror is the one this machine's apt uses, or
//! `$VMM_DEBIAN_MIRROR`; signatures are checked against the machine's `debian-archive-keyring`.

use crate::cache;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Debian's keys, in the package that every Debian has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Overrides the mirror: the URI up to `/dists`.
const MIRROR_VARIABLE: &str = "VMM_DEBIAN_MIRROR";

/// What the archive says about one version of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) version: String,
    pub(crate) sha256: String,
    pub(crate) depends: String,
}

/// Some suites of Debian's archive, with package lists of their own.
///
/// A value locks those lists until it is dropped, so a second one for the same suites waits.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
    suites: String,
    _lock: File,
}

impl Archive {
    /// Opens these suites, `["bookworm", "bookworm-backports"]` for example, and brings their package lists up to date. That
    /// takes seconds, so look first whether what is wanted is in the cache.
    ///
    /// # Errors
    /// There is no apt, no mirror is known, the mirror doesn't answer, or it isn't signed by Debian.
    pub fn open(suites: &[&str]) -> Result<Archive> {
        let key = suites.join("+");
        let lock = cache::lock(&format!("apt-{key}"))?;
        let archive = Archive { dir: cache::cache_dir()?.join("apt").join(&key), suites: key, _lock: lock };
        cache::create_dir(&archive.dir.join("lists/partial"))?;
        cache::create_dir(&archive.dir.join("cache/archives/partial"))?;
        let list = archive.dir.join("sources.list");
        fs::write(&list, source_list(&mirror()?, suites))
            .with_context(|| format!("cannot write {}", list.display()))?;
        let doing = format!("cannot fetch Debian's package lists of {}", archive.suites);
        run(archive.apt("apt-get").args(["--error-on=any", "update"]), &doing)?;
        Ok(archive)
    }

    /// An apt program (`apt-get`, `apt-cache`) that sees these suites and nothing else of this machine's sources.
    pub fn apt(&self, program: &str) -> Command {
        let mut command = apt_with_lists(program, &self.dir.join("lists"));
        option(&mut command, "Dir::Etc::sourcelist", self.dir.join("sources.list"));
        option(&mut command, "Dir::Etc::sourceparts", "-");
        option(&mut command, "Dir::Cache", self.dir.join("cache"));
        command
    }

    /// What the package lists say of this package: of one version, or of the version apt would choose.
    pub(crate) fn record(&self, package: &str, version: Option<&str>) -> Result<Option<Record>> {
        let output =
            output(self.apt("apt-cache").args(["show", "--no-all-versions"]).arg(spec(package, version)))?;
        // An unknown package is an error to apt, an unknown version just nothing to show.
        let record = parse_record(&String::from_utf8_lossy(&output.stdout));
        Ok((!record.version.is_empty()).then_some(record))
    }

    /// Downloads a package and returns its `.deb`, which the caller may remove. apt has compared its digest with the
    /// signed package list.
    ///
    /// # Errors
    /// The archive doesn't have that version, or apt's own first complaint.
    pub fn download(&self, package: &str, version: Option<&str>) -> Result<PathBuf> {
        let dir = self.dir.join("deb");
        cache::remove(&dir)?;
        cache::create_dir(&dir)?;
        let spec = spec(package, version);
        let doing = format!("cannot download {spec} from Debian's {}", self.suites);
        run(self.apt("apt-get").current_dir(&dir).arg("download").arg(&spec), &doing)?;
        let file = fs::read_dir(&dir)?.next().with_context(|| format!("{doing}: apt left no file"))??;
        let kept = self.dir.join(file.file_name());
        fs::rename(file.path(), &kept)?;
        Ok(kept)
    }
}

fn spec(package: &str, version: Option<&str>) -> String {
    version.map_or(package.to_owned(), |version| format!("{package}={version}"))
}

fn source_list(mirror: &str, suites: &[&str]) -> String {
    suites
        .iter()
        .map(|suite| format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n"))
        .collect()
}

/// The mirror of Debian that this machine uses.
fn mirror() -> Result<String> {
    if let Some(uri) = std::env::var(MIRROR_VARIABLE).ok().filter(|uri| !uri.is_empty()) {
        return Ok(uri);
    }
    ensure!(Path::new(KEYRING).is_file(), "{KEYRING} is missing: install the package debian-archive-keyring");
    // A fresh machine's apt has no lists yet and so doesn't know who is behind a URI: fetch lists beside its own.
    let known = match debian_main(Command::new("apt-get"))? {
        None => {
            let _lock = cache::lock("apt-machine")?;
            let lists = cache::cache_dir()?.join("apt/machine/lists");
            cache::create_dir(&lists.join("partial"))?;
            output(apt_with_lists("apt-get", &lists).arg("update"))?;
            debian_main(apt_with_lists("apt-get", &lists))?
        }
        known => known,
    };
    known.with_context(|| {
        format!(
            "no apt source of this machine serves Debian's main component: set {MIRROR_VARIABLE} to a mirror"
        )
    })
}

/// The URI of the first source that says it is Debian, not its security archive, and has `main`.
fn debian_main(mut apt: Command) -> Result<Option<String>> {
    let format = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)";
    let output = output(apt.env("LC_ALL", "C").args(["indextargets", "--format", format]))?;
    Ok(first_debian_main(&String::from_utf8_lossy(&output.stdout)))
}

fn first_debian_main(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| line.strip_prefix("Debian|Debian|main|")).map(str::to_owned)
}

/// An apt program that keeps its package lists in `lists`.
fn apt_with_lists(program: &str, lists: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    option(&mut command, "Dir::State::lists", lists);
    option(&mut command, "APT::Architecture", "amd64");
    option(&mut command, "APT::Architectures", "amd64");
    option(&mut command, "Acquire::Languages", "none");
    option(&mut command, "Acquire::Retries", "3");
    option(&mut command, "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false");
    // The cache belongs to the caller; apt's own user could not write there.
    option(&mut command, "APT::Sandbox::User", "root");
    command
}

fn option(command: &mut Command, name: &str, value: impl AsRef<Path>) {
    command.arg("-o").arg(format!("{name}={}", value.as_ref().display()));
}

pub(crate) fn run(command: &mut Command, doing: &str) -> Result<Output> {
    let output = output(command)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{doing}: {}", complaint(&stderr).unwrap_or("it failed without saying why"));
    }
    Ok(output)
}

fn output(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.output().with_context(|| format!("cannot run {program}: guest kernels need a Debian machine"))
}

/// The first error in apt's output; without one, the last line.
fn complaint(stderr: &str) -> Option<&str> {
    let error = stderr.lines().find_map(|line| line.strip_prefix("E: "));
    error.or(stderr.lines().rfind(|line| !line.trim().is_empty()))
}

fn parse_record(text: &str) -> Record {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.unwrap_or_default().to_owned()
    };
    Record { version: field("Version"), sha256: field("SHA256"), depends: field("Depends") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_debian_itself_and_its_main_component() {
        let targets = "Debian|Debian-Security|main|http://a/security/\nDocker|Docker CE|stable|http://b/\n\
                       Debian|Debian|contrib|http://c/\nDebian|Debian|main|http://d/debian/\n";
        assert_eq!(first_debian_main(targets).as_deref(), Some("http://d/debian/"));
        assert_eq!(first_debian_main(""), None);
    }

    #[test]
    fn a_record_is_read_by_field_name() {
        let text = "Package: p\nVersion: 1:2-3\nDepends: a (= 1), b\nSHA256: 00ff\n";
        let record = Record { version: "1:2-3".into(), sha256: "00ff".into(), depends: "a (= 1), b".into() };
        assert_eq!(parse_record(text), record);
    }

    #[test]
    fn the_complaint_is_the_first_error() {
        assert_eq!(complaint("W: odd\nE: gone\nE: more\n"), Some("gone"));
        assert_eq!(complaint("last words\n\n"), Some("last words"));
        assert_eq!(complaint(""), None);
    }

    #[test]
    fn each_suite_has_its_line_and_debians_key() {
        let list = source_list("http://d/debian", &["trixie", "sid"]);
        assert_eq!(list.lines().count(), 2);
        assert!(list.lines().all(|line| line.contains(KEYRING) && line.ends_with(" main")), "{list}");
    }
}
