//! What a seal adds to the digests that every snapshot has.

use super::*;
use crate::ChunkPlace;
use crate::{
    About, ChunkContent, Contents, GenerationId, GuestKernel, RamRange, RamSource, Registers, write_sealed,
};

/// A page of ones, then zeroes.
struct Ram([RamRange; 1]);

impl RamSource for Ram {
    fn ranges(&self) -> &[RamRange] {
        &self.0
    }

    fn read_chunk(&self, _gpa: u64, buf: &mut [u8]) -> io::Result<ChunkContent> {
        buf.fill(0);
        buf[..4096].fill(1);
        Ok(ChunkContent::Data)
    }
}

fn sealed(key: &SealKey) -> Snapshot {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sealed");
    let about = About {
        generation: GenerationId([7; 16]),
        created_unix_ns: 0,
        writer: "test".to_owned(),
        kernel: GuestKernel::default(),
        host_needs: Vec::new(),
        devices: Vec::new(),
    };
    let ram = Ram([RamRange { gpa: 0, len: 0x4000 }]);
    let vcpus = [Registers::default()];
    let contents = Contents { about, vcpus: &vcpus, vmcoreinfo: None, sections: &[], ram: &ram, delta: None };
    write_sealed(&path, &contents, Some(key), &mut |_, _| ()).unwrap();
    UnverifiedSnapshot::open(&path).unwrap().verify().unwrap()
}

/// As if somebody had found other RAM with the same 64 bits of XXH3, which is not hard.
#[test]
fn ram_with_the_digest_but_not_the_seal_is_refused() {
    let key = SealKey::of(&[1; 32]);
    let forge = |snapshot: &mut Snapshot| snapshot.seal.as_mut().unwrap().digests[0][0] ^= 1;
    let mut snapshot = sealed(&key);
    forge(&mut snapshot);
    assert!(snapshot.verify_ram(&mut |_, _| ()).is_ok(), "without a key there is only the shorter digest");
    let mut snapshot = sealed(&key).authenticate(&key).unwrap();
    assert!(snapshot.verify_ram(&mut |_, _| ()).is_ok());
    forge(&mut snapshot);
    let error = snapshot.verify_ram(&mut |_, _| ()).unwrap_err();
    assert!(
        matches!(error, RamError::Seal { chunk: ChunkPlace { gpa: 0, len: 0x4000, packed: false }, .. }),
        "{error}"
    );
}
