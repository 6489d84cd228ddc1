//! The features of a network device (sections 5.1.3 and 5.1.6), and what they ask of the wire.
//!
//! In: feature bits that a driver accepted. Out: [`Offloads`] for the host, and whether a header keeps to them. Holds: a
//! frame is passed on only if its header asks for what was negotiated.

/// The driver leaves checksums of what it sends to the device.
const CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum isn't filled in.
pub(super) const GUEST_CSUM: u64 = 1 << 1;
/// The driver may turn the offloads of what it receives off and on.
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration has an MTU.
pub(super) const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
/// A received frame may fill several buffers.
pub(super) const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
/// The driver announces itself to its neighbours when asked to.
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;

/// What concerns received frames, and may be changed by `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`.
pub(super) const RECEIVING: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

/// What is offered, but for the MTU.
pub(super) const OFFERED: u64 = CSUM
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | RECEIVING
    | CTRL_GUEST_OFFLOADS
    | MAC
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | GUEST_ANNOUNCE;

/// Bytes of `struct virtio_net_hdr` with `num_buffers`, which each frame has in front.
pub(super) const HEADER: usize = 12;
/// Where in the header `num_buffers` is.
pub(super) const NUM_BUFFERS: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What the guest takes of received frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP and UDP checksums that aren't filled in.
    pub checksum: bool,
    /// TCP over IPv4 in segments longer than the MTU.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Such segments with the ECN bit.
    pub ecn: bool,
}

impl Offloads {
    /// From feature bits. Segments need checksums, and ECN segments (section 5.1.3.1).
    pub(super) fn from_features(features: u64) -> Self {
        let checksum = features & GUEST_CSUM != 0;
        let tso4 = checksum && features & GUEST_TSO4 != 0;
        let tso6 = checksum && features & GUEST_TSO6 != 0;
        Self { checksum, tso4, tso6, ecn: (tso4 || tso6) && features & GUEST_ECN != 0 }
    }
}

/// Whether the header of a frame to be sent asks for no more than was negotiated. Whether it fits the frame is the host's
/// kernel's to say.
pub(super) fn may_send(header: &[u8], features: u64) -> bool {
    let (&[flags, gso, ..], has) = (header, |feature| features & feature != 0) else { return false };
    let segments = match gso & !GSO_ECN {
        GSO_NONE => gso == GSO_NONE,
        GSO_TCPV4 => has(HOST_TSO4),
        GSO_TCPV6 => has(HOST_TSO6),
        _ => false,
    };
    let checksum = flags == 0 || flags == NEEDS_CSUM && has(CSUM);
    segments && checksum && (gso & GSO_ECN == 0 || has(HOST_ECN))
}
