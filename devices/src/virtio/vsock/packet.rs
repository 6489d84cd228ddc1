//! The 44 bytes before every packet (sections 5.10.6 and 5.10.6.3).
//!
//! In: bytes from a driver's buffer. Out: a [`Header`], and back. Holds: a header is plain numbers, none of them checked.

/// Bytes of a header. Data follows.
pub(super) const HEADER_LEN: usize = 44;
/// The host's context ID.
pub(super) const HOST_CID: u64 = 2;
/// Bytes in order, in one connection: the only type of socket here.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet is for.
pub(super) mod op {
    pub(in super::super) const INVALID: u16 = 0;
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flag of `SHUTDOWN`: the sender will not receive any more.
pub(super) const SHUT_RECEIVE: u32 = 1;
/// Flag of `SHUTDOWN`: the sender will not send any more.
pub(super) const SHUT_SEND: u32 = 2;
/// Both.
pub(super) const SHUT_BOTH: u32 = SHUT_RECEIVE | SHUT_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Context ID of the sender.
    pub(super) src_cid: u64,
    /// Context ID of the receiver.
    pub(super) dst_cid: u64,
    /// Port of the sender.
    pub(super) src_port: u32,
    /// Port of the receiver.
    pub(super) dst_port: u32,
    /// Bytes of data after the header.
    pub(super) len: u32,
    /// Type of socket.
    pub(super) kind: u16,
    /// See [`op`].
    pub(super) op: u16,
    /// Flags, for `SHUTDOWN`.
    pub(super) flags: u32,
    /// Bytes that the sender can keep for the receiver's end of the connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of them, ever, modulo 2³².
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads one; every pattern of bits is one.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes one.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        let bytes: [u8; HEADER_LEN] = std::array::from_fn(|at| at as u8 + 1);
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
