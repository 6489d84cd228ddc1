//! Builds the stub's program, freestanding, with the compiler that builds everything else.
//!
//! In: `program/`, `src/abi.rs` and the `snapshot-format` crate. Out: a flat image in `OUT_DIR` for each of [`PROGRAMS`]. Holds:
//! the host's target is enough; the program's dependencies have the versions of this workspace, since its lock file is used.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Names, and what the processor has to have.
const PROGRAMS: [(&str, &str); 3] = [("sse2", "+sse2"), ("avx2", "+avx2"), ("avx512", "+avx512f")];
const TARGET: &str = "x86_64-unknown-linux-gnu";
const LINK: [&str; 6] =
    ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--oformat=binary", "-Wl,--build-id=none"];
/// What cargo and its wrappers say about this build script's own build.
const NOT_OURS: [&str; 5] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
];

fn main() {
    let own = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let root = own.join("../..").canonicalize().expect("the workspace is two directories up");
    for path in
        ["program", "src/abi.rs", "../guests/rt/memory.rs", "../../snapshot/format", "../../Cargo.lock"]
    {
        println!("cargo::rerun-if-changed={path}");
    }
    let project = Path::new(&variable("OUT_DIR")).join("project");
    fs::create_dir_all(&project).expect("OUT_DIR can be written");
    fs::write(project.join("Cargo.toml"), manifest(&own, &root)).expect("OUT_DIR can be written");
    fs::copy(root.join("Cargo.lock"), project.join("Cargo.lock")).expect("the workspace has a lock file");
    for (name, features) in PROGRAMS {
        build(&own, &root, &project, features);
        let program = project.join("target").join(TARGET).join("release/stub");
        fs::copy(program, project.join(format!("../{name}.bin"))).expect("cargo has made the program");
    }
}

/// A workspace of its own: other profile, other flags.
fn manifest(own: &Path, root: &Path) -> String {
    let (main, format) = (own.join("program/main.rs"), root.join("snapshot/format"));
    format!(
        "[package]\nname = \"stub\"\nedition = \"2024\"\n\n[workspace]\n\n[[bin]]\nname = \"stub\"\npath = {main:?}\n\n\
         [dependencies]\nsnapshot-format = {{ path = {format:?} }}\n\n\
         [profile.release]\npanic = \"abort\"\nopt-level = \"s\"\nlto = \"fat\"\ncodegen-units = 1\n\
         strip = \"none\"\n\n[profile.release.package.xxhash-rust]\nopt-level = 3\n\n\
         [profile.release.package.snapshot-format]\nopt-level = 3\n"
    )
}

fn build(own: &Path, root: &Path, project: &Path, features: &str) {
    let mut cargo = Command::new(variable("CARGO"));
    for name in NOT_OURS {
        cargo.env_remove(name);
    }
    // Paths of sources are in the messages of panics.
    let flags = [format!("--remap-path-prefix={}=.", root.display()), format!("-Ctarget-feature={features}")];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.current_dir(project).args(["rustc", "--release", "--offline", "--target", TARGET]);
    cargo.arg("--target-dir").arg(project.join("target")).args(["--bin", "stub", "--"]);
    cargo.args(["-Crelocation-model=static", "-Cno-redzone=yes"]);
    cargo.args(LINK.map(|argument| format!("-Clink-arg={argument}")));
    cargo.arg(format!("-Clink-arg=-T{}", own.join("program/link.ld").display()));
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "{cargo:?} failed");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for a build script"))
}
