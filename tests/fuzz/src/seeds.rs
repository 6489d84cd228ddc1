//! Writes honest inputs for the targets to begin with: a snapshot; a difference and its parent; an archive.
//!
//! Argument: a directory, in which `file/`, `chain/` and `archive/` are made.

use snapshot::{Contents, Delta, GenerationId, PageSet, Parent, SealKey, UnverifiedSnapshot, delta};
use std::fs;
use std::path::Path;

#[path = "../../../snapshot/tests/file/machine.rs"]
#[allow(dead_code)]
mod machine;
use machine::Machine;

fn main() {
    let dir = std::env::args_os().nth(1).expect("a directory");
    let dir = Path::new(&dir);
    for name in ["file", "chain", "archive", "work"] {
        fs::create_dir_all(dir.join(name)).expect("a directory");
    }
    let (parent, top) = (dir.join("work/parent"), dir.join("work/top"));
    let mut machine = Machine::tiny();
    machine.write(&parent).expect("a snapshot");
    let key = SealKey::of(&[7; 32]);
    machine.write_sealed(&dir.join("file/sealed"), Some(&key)).expect("a snapshot with a seal");
    difference(&mut machine, &parent, &top);
    vmm::archive::pack(&parent, &dir.join("archive/whole")).expect("an archive");
    let [parent, top] = [parent, top].map(|path| fs::read(path).expect("a snapshot"));
    let both = [&(top.len() as u32).to_le_bytes()[..], &top, &parent].concat();
    for (name, bytes) in [("file/whole", &parent), ("file/difference", &top), ("chain/two", &both)] {
        fs::write(dir.join(name), bytes).expect("room for a seed");
    }
}

fn difference(machine: &mut Machine, parent: &Path, top: &Path) {
    let Machine { about, vcpus, sections, ram, .. } = machine;
    about.generation = GenerationId([101; 16]);
    let parent = UnverifiedSnapshot::open(parent).expect("a file").verify_link().expect("a snapshot");
    let mut changed = PageSet::none_of(delta::pages(&ram.ranges));
    changed.insert(1..2);
    let delta = Delta { parent: Parent::of(&parent, top), changed };
    let about = about.clone();
    let contents = Contents { about, vcpus, vmcoreinfo: None, sections, ram, delta: Some(&delta) };
    snapshot::write(top, &contents, &mut |_, _| ()).expect("a difference");
}
