//! Builds the bare-metal guests, freestanding, with the compiler that builds everything else.
//!
//! In: `guests/*.rs`, each a program. Out: an ELF file for each in `OUT_DIR`, for `src/bare.rs`. Holds: stable Rust and
//! the host's target are enough.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The handlers in ring 0 have stacks of their own, but a red zone is nothing to rely on in code without an OS.
const CODEGEN: [&str; 5] =
    ["panic=abort", "relocation-model=static", "no-redzone=yes", "opt-level=2", "strip=debuginfo"];
const LINK: [&str; 6] =
    ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Tguests/link.ld", "-Wl,--build-id=sha1"];

fn main() {
    println!("cargo::rerun-if-changed=guests");
    for entry in fs::read_dir("guests").expect("guests/ is part of this crate") {
        let source = entry.expect("a directory can be read").path();
        if source.extension().is_some_and(|extension| extension == "rs") {
            build(&source);
        }
    }
}

fn build(source: &Path) {
    let name = source.file_stem().expect("a source file has a name");
    let out = Path::new(&variable("OUT_DIR")).join(name);
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-type", "bin", "--target", TARGET]);
    rustc.arg("--crate-name").arg(name).arg("-o").arg(out).arg(source);
    rustc.args(CODEGEN.map(|option| format!("-C{option}")));
    rustc.args(LINK.map(|argument| format!("-Clink-arg={argument}")));
    let status = rustc.status().expect("cargo names a compiler that can be run");
    assert!(status.success(), "{rustc:?} failed");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for a build script"))
}
