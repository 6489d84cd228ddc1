//! The ELF kernel inside a bzImage.
//!
//! In: the bytes of a bzImage. Out: the `vmlinux` that it would unpack at boot. Holds: every offset in the header is
//! checked against the file, and the result is an ELF file.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header".

use anyhow::{Context, Result, bail, ensure};
use std::io::Read;

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The boot protocol that brought the payload fields, 2.08.
const VERSION_WITH_PAYLOAD: u32 = 0x208;
/// More than any kernel unpacks to; a length above it is a lie.
const VMLINUX_MAX: u32 = 1 << 30;

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// What one block of an LZ4 legacy frame unpacks to at most.
const LZ4_BLOCK: usize = 8 << 20;

/// The ELF kernel inside `image`.
///
/// # Errors
/// It is no bzImage, its header points outside it, or its payload is broken or compressed in a way Debian doesn't use.
pub(crate) fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image)?;
    let vmlinux = unpack(payload)?;
    ensure!(vmlinux.starts_with(b"\x7fELF"), "the bzImage's payload does not unpack to an ELF file");
    Ok(vmlinux)
}

/// The compressed kernel, which the setup header points at.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let field = |at: usize, len: usize| image.get(at..at + len).context("shorter than a bzImage's header");
    let long = |at| field(at, 4).map(le32);
    ensure!(field(HEADER_MAGIC, 4)? == b"HdrS", "no bzImage: the setup header's magic is not HdrS");
    ensure!(long(VERSION)? & 0xffff >= VERSION_WITH_PAYLOAD, "a bzImage older than boot protocol 2.08");
    // Zero setup sectors mean four, says the boot protocol.
    let setup_sects = match field(SETUP_SECTS, 1)?[0] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sects + 1) * 512 + long(PAYLOAD_OFFSET)? as usize;
    let end = start + long(PAYLOAD_LENGTH)? as usize;
    image.get(start..end).context("the bzImage's payload lies outside the file")
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>> {
    // The build appends the unpacked size as 32 bits, whatever the compression.
    let (stream, size) = payload.split_last_chunk::<4>().context("the bzImage's payload is empty")?;
    let size = u32::from_le_bytes(*size);
    ensure!(size <= VMLINUX_MAX, "the bzImage claims to unpack to {size} bytes");
    if stream.starts_with(ZSTD) {
        read_all(zstd::Decoder::new(stream)?.single_frame(), size)
    } else if stream.starts_with(LZ4_LEGACY) {
        lz4_legacy(&stream[LZ4_LEGACY.len()..], size)
    } else if stream.starts_with(XZ) {
        read_all(lzma_rust2::XzReader::new(stream, false), size)
    } else if stream.starts_with(GZIP) {
        bail!("the bzImage's payload is compressed with gzip, which is not supported; zstd, lz4 and xz are")
    } else {
        bail!("the bzImage's payload is compressed in an unknown way")
    }
}

fn read_all(stream: impl Read, size: u32) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(size as usize);
    stream.take(u64::from(size)).read_to_end(&mut out).context("cannot unpack the bzImage's payload")?;
    ensure!(out.len() == size as usize, "the bzImage's payload unpacks to {} bytes, not {size}", out.len());
    Ok(out)
}

/// A legacy frame is blocks, each preceded by its compressed size in 32 bits.
fn lz4_legacy(mut stream: &[u8], size: u32) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(size as usize);
    let mut block = vec![0; LZ4_BLOCK];
    while out.len() < size as usize {
        let (len, rest) = stream.split_first_chunk::<4>().context("the bzImage's payload is cut short")?;
        let len = u32::from_le_bytes(*len) as usize;
        let packed = rest.get(..len).context("the bzImage's payload is cut short")?;
        let unpacked = lz4_flex::block::decompress_into(packed, &mut block)?;
        out.extend_from_slice(&block[..unpacked]);
        stream = &rest[len..];
    }
    ensure!(out.len() == size as usize, "the bzImage's payload unpacks to more than {size} bytes");
    Ok(out)
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ELF: &[u8] = b"\x7fELF and the rest of a kernel, and the rest of a kernel";

    fn image(stream: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&16_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&(stream.len() as u32 + 4).to_le_bytes());
        image.extend_from_slice(stream);
        image.extend_from_slice(&(ELF.len() as u32).to_le_bytes());
        image
    }

    fn lz4() -> Vec<u8> {
        let block = lz4_flex::block::compress(ELF);
        [LZ4_LEGACY, &(block.len() as u32).to_le_bytes(), &block].concat()
    }

    #[test]
    fn finds_a_kernel_packed_with_lz4_and_with_zstd() {
        assert_eq!(vmlinux(&image(&lz4())).unwrap(), ELF);
        assert_eq!(vmlinux(&image(&zstd::encode_all(ELF, 3).unwrap())).unwrap(), ELF);
    }

    #[test]
    fn a_cut_image_is_an_error_at_every_length() {
        let whole = image(&lz4());
        for len in 0..whole.len() {
            assert!(vmlinux(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
        }
    }

    #[test]
    fn a_payload_outside_the_file_is_named() {
        let mut image = image(&lz4());
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(vmlinux(&image).unwrap_err().to_string(), "the bzImage's payload lies outside the file");
    }
}
