//! `guest-kernels`: fetch stock kernels into the cache, list them, build a test guest's initramfs and root.
//!
//! In: the command line. Out: paths on stdout, one line per thing; what is being done on stderr. Holds: a failure is one
//! line and status 1, wrong usage is status 2.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use guest_kernels::manifest::{self, KERNELS};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Stock Debian kernels and what they boot into.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Fetch kernels (all of them if none is named) and busybox, unless the cache has them.
    Fetch {
        /// Short names: 6.1, 6.12, 7.2.
        names: Vec<String>,
    },
    /// List the kernels of the manifest and where they are.
    List,
    /// Build a test guest's initramfs and print its path.
    Initrd {
        /// The kernel's short name.
        name: String,
        /// Copy it there too.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// A static program to put into /bin; may be given again.
        #[arg(long = "program", value_name = "FILE")]
        programs: Vec<PathBuf>,
    },
    /// Make the image of a small Debian with CRIU, for guests whose processes are to be checkpointed, and print its path.
    Root {
        /// Copy it there too.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Fetch { names } => fetch(&names),
        Verb::List => list(),
        Verb::Initrd { name, out, programs } => initrd(&name, out.as_deref(), &programs),
        Verb::Root { out } => guest_kernels::root_image().and_then(|path| tell(&path, out.as_deref())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-kernels: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fetch(names: &[String]) -> Result<()> {
    let all = || KERNELS.iter().map(|pin| pin.name.to_owned()).collect();
    let names: Vec<String> = if names.is_empty() { all() } else { names.to_vec() };
    // Every name is looked up before anything is fetched.
    names.iter().try_for_each(|name| manifest::kernel(name).map(drop))?;
    guest_kernels::busybox()?;
    for name in names {
        let kernel = guest_kernels::ensure(&name)?;
        println!("{} {} {}", kernel.name, kernel.release, kernel.vmlinuz.display());
    }
    Ok(())
}

fn list() -> Result<()> {
    println!("{:5} {:14} {:10} {:28} image", "name", "version", "suite", "release");
    for pin in &KERNELS {
        // A kernel taken in place of one that was gone has a release of its own.
        let (release, image) = match guest_kernels::cached(pin)? {
            Some(kernel) => (kernel.release, kernel.vmlinuz.display().to_string()),
            None => (pin.release.to_owned(), "not fetched".to_owned()),
        };
        println!("{:5} {:14} {:10} {release:28} {image}", pin.name, pin.version, pin.suite);
    }
    Ok(())
}

fn initrd(name: &str, out: Option<&Path>, programs: &[PathBuf]) -> Result<()> {
    let programs: Vec<&Path> = programs.iter().map(PathBuf::as_path).collect();
    tell(&guest_kernels::test_initrd(&guest_kernels::ensure(name)?, &programs)?, out)
}

/// Prints where a file is, or where its copy is.
fn tell(path: &Path, out: Option<&Path>) -> Result<()> {
    if let Some(out) = out {
        std::fs::copy(path, out).with_context(|| format!("cannot write {}", out.display()))?;
    }
    println!("{}", out.unwrap_or(path).display());
    Ok(())
}
