//! Programs that stopped processes would wait for, read into memory before they are stopped.
//!
//! In: names of programs. Out: nothing. Holds: it is a courtesy: what can't be read is read when it is needed.

use std::fs::File;
use std::io;
use std::process::{Command, Stdio};

/// CRIU, and what it has pack and unpack a tmpfs.
const PROGRAMS: [&str; 3] = ["criu", "tar", "gzip"];

/// Reads the programs and their libraries.
pub(crate) fn programs() {
    let found = PROGRAMS.iter().filter_map(|name| find(name));
    let mut files: Vec<String> = found.flat_map(|path| [libraries(&path), vec![path]].concat()).collect();
    files.sort_unstable();
    files.dedup();
    read(files.iter().map(String::as_str));
}

/// Reads files from end to end.
pub(crate) fn read<'a>(files: impl IntoIterator<Item = &'a str>) {
    for file in files {
        let _ = File::open(file).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
    }
}

fn find(name: &str) -> Option<String> {
    let path = std::env::var("PATH").ok()?;
    let mut places = path.split(':').map(|dir| format!("{dir}/{name}"));
    places.find(|place| std::path::Path::new(place).is_file())
}

/// As the dynamic loader tells them, see ld.so(8): `\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f…)`.
fn libraries(program: &str) -> Vec<String> {
    let mut loader = Command::new(program);
    loader.env("LD_TRACE_LOADED_OBJECTS", "1").stdin(Stdio::null());
    let told = loader.output().map(|said| said.stdout).unwrap_or_default();
    paths(&String::from_utf8_lossy(&told)).map(str::to_owned).collect()
}

fn paths(told: &str) -> impl Iterator<Item = &str> {
    told.split_whitespace().filter(|word| word.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_names_paths() {
        let told = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f00)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f01)\n";
        assert_eq!(paths(told).collect::<Vec<_>>(), ["/lib/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
