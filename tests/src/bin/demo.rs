//! `demo`: stock kernels 6.1, 6.12 and 7.2 are booted, kept in a file and go on in another process.
//!
//! In: nothing; `--here` inside the lab. Out: a table. Holds: the status is 0 only if every guest went on where it was; it
//! runs on this machine's `/dev/kvm` if that runs Linux, else in the lab.

use anyhow::{Context, Result, bail};
use std::env;
use std::path::Path;
use std::process::ExitCode;
use vmm_tests::demo::{self, SAYS_BOOT_ID};
use vmm_tests::guests::{Guest, LINUX};
use vmm_tests::lab::Lab;

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("demo: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--here"] => show(&LINUX.map(|version| Guest::linux(version, SAYS_BOOT_ID)), "in the lab"),
        [] => choose(),
        _ => bail!("expected no arguments, or --here inside the lab"),
    }
}

fn choose() -> Result<ExitCode> {
    match vmm::doctor::can_run_linux() {
        Ok(()) => {
            let guests: Result<Vec<Guest>> = LINUX.into_iter().map(fetched).collect();
            show(&guests?, "on this machine's /dev/kvm")
        }
        Err(obstacle) => {
            println!("demo: not on this machine's /dev/kvm: {obstacle}");
            println!(
                "demo: in the lab, whose processor is emulated: all times are longer than on a real one"
            );
            in_the_lab()
        }
    }
}

/// The kernel from the cache.
fn fetched(version: &str) -> Result<Guest> {
    let kernel = guest_kernels::ensure(version)?;
    let initrd = guest_kernels::test_initrd(&kernel, &[])?;
    Ok(Guest::linux(version, SAYS_BOOT_ID).files(kernel.vmlinux, initrd))
}

/// This program, in the lab.
fn in_the_lab() -> Result<ExitCode> {
    let dir = tempfile::tempdir().context("no directory for the lab's copy of this program")?;
    copy_self(&dir.path().join("demo"))?;
    let status = Lab::new().extra(dir.path()).stream("/extra/demo --here", &mut std::io::stdout())?;
    Ok(ExitCode::from(status))
}

fn copy_self(to: &Path) -> Result<()> {
    let exe = env::current_exe().context("cannot find this program")?;
    std::fs::copy(&exe, to).with_context(|| format!("cannot copy {}", exe.display()))?;
    Ok(())
}

fn show(guests: &[Guest], place: &str) -> Result<ExitCode> {
    let dir = tempfile::tempdir().context("no directory for the snapshots")?;
    let kept = demo::keep(guests, dir.path())?;
    println!("\n{}\n\nThis ran {place}.", demo::table(&kept));
    Ok(ExitCode::SUCCESS)
}
