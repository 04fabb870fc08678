//! Network layer: the fixed headers of IPv4 (RFC 791) and IPv6 (RFC 8200).

use warren_abi::DropReason;

use crate::{Link, Network, Packet};

/// An address of either family, in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// IPv4.
    V4([u8; 4]),
    /// IPv6.
    V6([u8; 16]),
}

impl Address {
    /// fe80::/10, 169.254.0.0/16, or a multicast or broadcast address.
    #[inline(always)]
    pub fn is_link_scoped(&self) -> bool {
        match self {
            Self::V4(a) => a[0] >= 224 || (a[0] == 169 && a[1] == 254),
            Self::V6(a) => a[0] == 0xff || (a[0] == 0xfe && a[1] & 0xc0 == 0x80),
        }
    }
}

/// The fixed header of an IP packet. All offsets count from the start of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Hop limit or TTL.
    pub hops: u8,
    /// IPv4: the payload's protocol. IPv6: the first extension header or the payload's protocol.
    pub next: u8,
    /// Offset of the fixed header.
    pub start: usize,
    /// Offset after the fixed header, IPv4 options included.
    pub payload: usize,
    /// Offset after the packet. What follows is padding of the link, which no parser may read.
    pub end: usize,
    /// IPv4: flags and fragment offset. IPv6: 0.
    pub fragment_field: u16,
}

/// Length fields are 16 bits wide; larger super-packets carry 0 (RFC 2675, and likewise IPv4 in the kernel).
const LARGEST: usize = 65_535;

impl Ip {
    /// Reads the fixed header of an IP packet; `None` where the frame is not IP.
    #[inline(always)]
    pub fn parse<P: Packet>(packet: &P, link: Link) -> Result<Option<Self>, DropReason> {
        match link.network {
            Network::V4 => Self::v4(packet, link.offset).map(Some),
            Network::V6 => Self::v6(packet, link.offset).map(Some),
            Network::Arp | Network::Other => Ok(None),
        }
    }

    #[inline(always)]
    fn v4<P: Packet>(packet: &P, start: usize) -> Result<Self, DropReason> {
        let h = packet.load::<20>(start).ok_or(DropReason::Truncated)?;
        let header = usize::from(h[0] & 0xf) * 4;
        if h[0] >> 4 != 4 || header < 20 {
            return Err(DropReason::Malformed);
        }
        let available = packet.length().saturating_sub(start);
        let total = match usize::from(u16::from_be_bytes([h[2], h[3]])) {
            0 if available > LARGEST => available,
            total => total,
        };
        if total < header {
            return Err(DropReason::Malformed);
        }
        if total > available {
            return Err(DropReason::Truncated);
        }
        Ok(Self {
            source: Address::V4([h[12], h[13], h[14], h[15]]),
            destination: Address::V4([h[16], h[17], h[18], h[19]]),
            hops: h[8],
            next: h[9],
            start,
            payload: start + header,
            end: start + total,
            fragment_field: u16::from_be_bytes([h[6], h[7]]),
        })
    }

    #[inline(always)]
    fn v6<P: Packet>(packet: &P, start: usize) -> Result<Self, DropReason> {
        let h = packet.load::<8>(start).ok_or(DropReason::Truncated)?;
        let source = packet.load::<16>(start + 8).ok_or(DropReason::Truncated)?;
        let destination = packet.load::<16>(start + 24).ok_or(DropReason::Truncated)?;
        if h[0] >> 4 != 6 {
            return Err(DropReason::Malformed);
        }
        let available = packet.length().saturating_sub(start + 40);
        let length = match usize::from(u16::from_be_bytes([h[4], h[5]])) {
            0 if available > LARGEST => available,
            length => length,
        };
        if length > available {
            return Err(DropReason::Truncated);
        }
        Ok(Self {
            source: Address::V6(source),
            destination: Address::V6(destination),
            hops: h[7],
            next: h[6],
            start,
            payload: start + 40,
            end: start + 40 + length,
            fragment_field: 0,
        })
    }

    /// Reads `N` bytes of the packet, not of the padding behind it.
    #[inline(always)]
    pub(crate) fn load<const N: usize, P: Packet>(
        &self,
        packet: &P,
        offset: usize,
    ) -> Result<[u8; N], DropReason> {
        if offset + N > self.end {
            return Err(DropReason::Truncated);
        }
        packet.load::<N>(offset).ok_or(DropReason::Truncated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bytes, v4, v6};

    fn parse(network: Network, bytes: &[u8]) -> Result<Ip, DropReason> {
        Ip::parse(&Bytes(bytes), Link { network, offset: 0 }).map(|ip| ip.expect("is IP"))
    }

    #[test]
    fn fixed_headers() {
        let packet = v4([10, 1, 0, 2], [10, 1, 1, 3], 17, &[1, 2, 3, 4]);
        let ip = parse(Network::V4, &packet).unwrap();
        assert_eq!(ip.source, Address::V4([10, 1, 0, 2]));
        assert_eq!(ip.destination, Address::V4([10, 1, 1, 3]));
        assert_eq!((ip.next, ip.payload, ip.end), (17, 20, 24));
        let packet = v6("fd00::2", "fd00::3", 6, &[0; 20]);
        let ip = parse(Network::V6, &packet).unwrap();
        assert_eq!((ip.next, ip.payload, ip.end, ip.hops), (6, 40, 60, 64));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let packet = v4([10, 1, 0, 2], [10, 1, 1, 3], 17, &[0; 8]);
        for length in 0..packet.len() {
            assert_eq!(
                parse(Network::V4, &packet[..length]),
                Err(DropReason::Truncated),
                "{length}"
            );
        }
        let packet = v6("fd00::2", "fd00::3", 17, &[0; 8]);
        for length in 0..packet.len() {
            assert_eq!(
                parse(Network::V6, &packet[..length]),
                Err(DropReason::Truncated),
                "{length}"
            );
        }
    }

    #[test]
    fn contradictions_are_malformed() {
        let packet = v4([10, 1, 0, 2], [10, 1, 1, 3], 17, &[0; 8]);
        let mut changed = packet.clone();
        changed[0] = 0x44;
        assert_eq!(
            parse(Network::V4, &changed),
            Err(DropReason::Malformed),
            "header of 16 bytes"
        );
        changed[0] = 0x65;
        assert_eq!(
            parse(Network::V4, &changed),
            Err(DropReason::Malformed),
            "version 6"
        );
        changed[0] = 0x4f;
        assert_eq!(
            parse(Network::V4, &changed),
            Err(DropReason::Malformed),
            "header longer than the packet"
        );
        let mut changed = packet.clone();
        changed[2..4].copy_from_slice(&[0, 0]);
        assert_eq!(
            parse(Network::V4, &changed),
            Err(DropReason::Malformed),
            "length 0 of a small packet"
        );
        let mut changed = v6("fd00::2", "fd00::3", 17, &[]);
        changed[0] = 0x45;
        assert_eq!(parse(Network::V6, &changed), Err(DropReason::Malformed));
    }

    #[test]
    fn super_packets_without_length_field() {
        let mut packet = v4([10, 1, 0, 2], [10, 1, 1, 3], 6, &[0; 70_000]);
        packet[2..4].copy_from_slice(&[0, 0]);
        assert_eq!(parse(Network::V4, &packet).map(|ip| ip.end), Ok(70_020));
        let mut packet = v6("fd00::2", "fd00::3", 6, &[0; 70_000]);
        packet[4..6].copy_from_slice(&[0, 0]);
        assert_eq!(parse(Network::V6, &packet).map(|ip| ip.end), Ok(70_040));
    }

    #[test]
    fn padding_is_not_part_of_the_packet() {
        let mut packet = v4([10, 1, 0, 2], [10, 1, 1, 3], 17, &[]);
        packet.extend_from_slice(&[0xaa; 26]);
        let ip = parse(Network::V4, &packet).unwrap();
        assert_eq!(ip.end, 20);
        assert_eq!(ip.load::<1, _>(&Bytes(&packet), 20), Err(DropReason::Truncated));
    }

    #[test]
    fn link_scoped_addresses() {
        for (address, scoped) in [
            (Address::V4([224, 0, 0, 1]), true),
            (Address::V4([255, 255, 255, 255]), true),
            (Address::V4([169, 254, 1, 1]), true),
            (Address::V4([10, 0, 0, 1]), false),
        ] {
            assert_eq!(address.is_link_scoped(), scoped, "{address:?}");
        }
        for (text, scoped) in [
            ("ff02::1", true),
            ("fe80::1", true),
            ("febf::1", true),
            ("fec0::1", false),
            ("fd00::1", false),
        ] {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            assert_eq!(Address::V6(address.octets()).is_link_scoped(), scoped, "{text}");
        }
    }
}
