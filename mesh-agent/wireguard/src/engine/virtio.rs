//! The header in front of every packet of a TUN device with offloads: `struct virtio_net_hdr`, ten bytes in native byte
//! order (virtio 1.2, section 5.1.6; Linux `include/uapi/linux/virtio_net.h`).

/// Bytes of the header.
pub(super) const HEADER: usize = 10;

/// The transport checksum is still to be computed.
const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A flag beside the type: TCP with explicit congestion notification.
const GSO_ECN: u8 = 0x80;

/// What a packet is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One packet.
    Single,
    /// Several TCP segments.
    Tcp,
    /// Several UDP datagrams.
    Udp,
}

/// The header's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Virtio {
    pub(super) kind: Kind,
    /// For [`Kind::Tcp`] and [`Kind::Udp`]: whether the packet is IPv6, as the header says.
    pub(super) v6: Option<bool>,
    pub(super) needs_checksum: bool,
    pub(super) header_len: u16,
    /// Payload bytes of every segment but the last.
    pub(super) segment: u16,
    /// Where the transport header begins.
    pub(super) checksum_start: u16,
    /// Where the checksum is in the transport header.
    pub(super) checksum_offset: u16,
}

impl Virtio {
    /// One packet with its checksums in place.
    pub(super) const SINGLE: Self = Self {
        kind: Kind::Single,
        v6: None,
        needs_checksum: false,
        header_len: 0,
        segment: 0,
        checksum_start: 0,
        checksum_offset: 0,
    };

    /// `None` for an offload that was not asked for.
    pub(super) fn parse(bytes: [u8; HEADER]) -> Option<Self> {
        let (kind, v6) = match bytes[1] & !GSO_ECN {
            GSO_NONE => (Kind::Single, None),
            GSO_TCPV4 => (Kind::Tcp, Some(false)),
            GSO_TCPV6 => (Kind::Tcp, Some(true)),
            GSO_UDP_L4 => (Kind::Udp, None),
            _ => return None,
        };
        let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            kind,
            v6,
            needs_checksum: bytes[0] & NEEDS_CSUM != 0,
            header_len: field(2),
            segment: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        })
    }

    pub(super) fn bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        bytes[1] = match (self.kind, self.v6) {
            (Kind::Single, _) => GSO_NONE,
            (Kind::Tcp, Some(true)) => GSO_TCPV6,
            (Kind::Tcp, _) => GSO_TCPV4,
            (Kind::Udp, _) => GSO_UDP_L4,
        };
        bytes[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.segment.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.checksum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way_through_bytes() {
        for (kind, v6) in [
            (Kind::Single, None),
            (Kind::Tcp, Some(false)),
            (Kind::Tcp, Some(true)),
            (Kind::Udp, None),
        ] {
            let header = Virtio {
                kind,
                v6,
                needs_checksum: true,
                header_len: 52,
                segment: 1368,
                checksum_start: 20,
                checksum_offset: 16,
            };
            assert_eq!(Virtio::parse(header.bytes()), Some(header));
        }
        assert_eq!(Virtio::parse([0; HEADER]), Some(Virtio::SINGLE));
    }

    #[test]
    fn ecn_is_no_other_kind_and_ufo_is_refused() {
        let mut bytes = [0; HEADER];
        bytes[1] = GSO_TCPV4 | GSO_ECN;
        assert_eq!(Virtio::parse(bytes).map(|header| header.kind), Some(Kind::Tcp));
        bytes[1] = 3;
        assert_eq!(Virtio::parse(bytes), None);
    }
}
