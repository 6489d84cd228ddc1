//! Any bytes as a snapshot: the host's reader and the restore stub's never panic, take little memory, and agree.

#![no_main]

#[path = "common.rs"]
mod common;

use libfuzzer_sys::{Corpus, fuzz_mutator, fuzz_target};
use snapshot::delta;
use snapshot_format::image::Image;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    if seed % 4 != 0 {
        common::seal(&mut data[..size]);
    }
    size
});

fuzz_target!(|data: &[u8]| -> Corpus {
    let by_stub = Image::check(data).is_ok();
    let file = common::file_of(data);
    let whole = snapshot::UnverifiedSnapshot::of(file.try_clone().unwrap(), "fuzz".into()).verify();
    assert!(by_stub || whole.is_err(), "the host takes what the stub refuses");
    let Ok(link) = snapshot::UnverifiedSnapshot::of(file, "fuzz".into()).verify_link() else {
        return Corpus::Keep;
    };
    let pages = delta::pages(&link.manifest().ram.ranges);
    let changed = link.delta().into_iter().flat_map(|delta| delta.changed.runs(0..pages));
    assert!(changed.map(|run| run.end).max() <= Some(pages));
    let _ = link.verify_ram(&mut |_, _| ());
    assert!(link.zero_bytes().unwrap() <= link.manifest().ram.bytes);
    for section in link.sections() {
        let _ = section.decode::<Vec<String>>(section.version);
    }
    assert!(link.ram().iter().all(|mapped| mapped.offset + mapped.range.len <= data.len() as u64));
    Corpus::Keep
});
