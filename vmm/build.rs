//! Tells the linker in which order the program's code lies.

fn main() {
    println!("cargo::rerun-if-changed=restore.ld");
    println!("cargo::rustc-link-arg-bin=vmm=-T{}/restore.ld", env!("CARGO_MANIFEST_DIR"));
}
