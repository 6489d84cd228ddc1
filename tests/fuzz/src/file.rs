//! Any bytes as a snapshot: the host's reader and the restore stub's never panic, take little memory, and agree.

#![no_main]

#[path = "common.rs"]
mod common;

use libfuzzer_sys::{Corpus, fuzz_target};
use snapshot::{SealKey, delta};
use snapshot_format::image::Image;

common::mutate_and!(common::seal);

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
    assert!(link.zero_bytes().unwrap() <= link.ram_bytes());
    let own =
        link.delta().map_or(link.manifest().ram.bytes, |delta| delta.changed.len() * snapshot::PAGE_SIZE);
    assert_eq!(link.ram_bytes(), own);
    for section in link.sections() {
        let _ = section.decode::<Vec<String>>(section.version);
    }
    assert!(link.ram().iter().all(|mapped| mapped.offset + mapped.range.len <= data.len() as u64));
    if let Ok(own) = link.authenticate(&SealKey::of(&[7; 32])) {
        let _ = own.verify_ram(&mut |_, _| ());
    }
    Corpus::Keep
});
