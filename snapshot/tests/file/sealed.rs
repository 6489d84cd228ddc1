//! Snapshots that were written with a key, and what somebody without it makes of them.

use crate::damage::Victim;
use crate::machine::{Machine, verify};
use snapshot::{SealError, SealKey};
use snapshot_format::Image;

fn keys() -> [SealKey; 2] {
    [[1; 32], [2; 32]].map(|bytes| SealKey::of(&bytes))
}

/// Where the seal's note is: header, name and descriptor.
fn note(file: &[u8]) -> std::ops::Range<usize> {
    let name = [&0x534e_4154u32.to_le_bytes()[..], b"VMMSNAP\0"].concat();
    let at = file.windows(name.len()).position(|window| window == name).expect("a seal") - 8;
    let len = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap()) as usize;
    at..at + 20 + len
}

#[test]
fn it_is_known_by_its_key_and_by_no_other() {
    let [key, other] = keys();
    let file = Machine::small().sealed_file(&key);
    assert!(Image::check(&file).is_ok(), "the stub can't read it");
    let snapshot = verify(&file).unwrap();
    assert!(snapshot.is_sealed());
    let snapshot = snapshot.authenticate(&key).unwrap();
    snapshot.verify_ram(&mut |_, _| ()).unwrap();
    let wrong = verify(&file).unwrap().authenticate(&other).unwrap_err();
    assert!(matches!(wrong, SealError::Wrong(_)), "{wrong}");
    let none = verify(&Machine::small().file()).unwrap().authenticate(&key).unwrap_err();
    assert!(matches!(none, SealError::None(_)), "{none}");
}

/// Every other machine, under CRCs and digests that are right, with the seal of this one.
#[test]
fn a_seal_does_not_fit_another_machine() {
    type Change = fn(&mut Machine);
    let [key, other] = keys();
    let honest = Machine::small().sealed_file(&key);
    let changes: [(&str, Change); 6] = [
        ("nothing", |_| ()),
        ("id", |machine| machine.about.generation.0[0] ^= 1),
        ("registers", |machine| machine.vcpus[1].rax ^= 1),
        ("state", |machine| machine.sections[0].bytes[0] ^= 1),
        ("VMCOREINFO", |machine| machine.vmcoreinfo = Some(&[b'x'; crate::machine::VMCOREINFO.len()])),
        ("RAM", |machine| machine.ram.pages.get_mut(&0x7000).unwrap()[9] ^= 1),
    ];
    for (what, change) in changes {
        let mut machine = Machine::small();
        change(&mut machine);
        let mut forged = machine.sealed_file(&other);
        assert_eq!(note(&forged), note(&honest), "{what}");
        forged[note(&honest)].copy_from_slice(&honest[note(&honest)]);
        let snapshot = verify(&forged).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        snapshot.verify_ram(&mut |_, _| ()).unwrap();
        assert_eq!(snapshot.authenticate(&key).is_ok(), what == "nothing", "{what}");
    }
}

#[test]
fn any_flipped_bit_of_it_is_found() {
    let [key, _] = keys();
    let bytes = Machine::tiny().sealed_file(&key);
    let victim = Victim::new(&bytes);
    assert_eq!(victim.complaint(), None);
    for offset in note(&bytes) {
        for bit in 0..8 {
            victim.put(offset, bytes[offset] ^ (1 << bit));
            assert!(victim.complaint().is_some(), "bit {bit} of byte {offset}");
        }
        victim.put(offset, bytes[offset]);
    }
}
