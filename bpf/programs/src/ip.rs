//! Network layer: the fixed headers of IPv4 (RFC 791) and IPv6 (RFC 8200).

use warren_abi::DropReason;

use crate::{Link, Network, Packet, Scratch};

/// An address of either family, in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Address {
    /// IPv4.
    V4([u8; 4]),
    /// IPv6.
    V6([u8; 16]),
}

impl Address {
    /// The address of a family whose bytes are the first of 16.
    #[inline(always)]
    pub(crate) fn of(family: u8, bytes: &[u8; 16]) -> Self {
        if family == 4 {
            Self::V4([bytes[0], bytes[1], bytes[2], bytes[3]])
        } else {
            Self::V6(*bytes)
        }
    }

    /// IPv4 in the first four bytes, the others zero.
    #[inline(always)]
    pub(crate) fn octets(&self) -> [u8; 16] {
        match self {
            Self::V4(a) => [a[0], a[1], a[2], a[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            Self::V6(a) => *a,
        }
    }

    /// An IPv6 address in fe80::/64, where all link-local ones are (RFC 4291 section 2.5.6).
    #[inline(always)]
    pub fn is_link_local_v6(&self) -> bool {
        match self {
            Self::V4(_) => false,
            Self::V6(a) => a[0] == 0xfe && a[1] == 0x80 && a[2..8] == [0; 6],
        }
    }

    /// fe80::/10, 169.254.0.0/16, or a multicast or broadcast address.
    #[inline(always)]
    pub fn is_link_scoped(&self) -> bool {
        match self {
            Self::V4(a) => a[0] >= 224 || (a[0] == 169 && a[1] == 254),
            Self::V6(a) => a[0] == 0xff || (a[0] == 0xfe && a[1] & 0xc0 == 0x80),
        }
    }
}

impl Default for Address {
    fn default() -> Self {
        Self::V4([0; 4])
    }
}

/// The fixed header of an IP packet. All offsets count from the start of the packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
    /// IPv4: identification. IPv6: 0.
    pub id: u16,
}

/// Length fields are 16 bits wide; larger super-packets carry 0 (RFC 2675, and likewise IPv4 in the kernel).
const LARGEST: usize = 65_535;

/// Reads the fixed header into the program's memory; `false` where the frame is not IP.
///
/// A function of its own in the kernel too: its buffers do not fit onto the stack beside those of its callers.
#[inline(never)]
pub(crate) fn read<P: Packet>(packet: &P, scratch: &mut Scratch, link: Link) -> Result<bool, DropReason> {
    match link.network {
        Network::V4 => read_v4(packet, scratch, link.offset)?,
        Network::V6 => read_v6(packet, scratch, link.offset)?,
        Network::Arp | Network::Other => return Ok(false),
    }
    scratch.tuple.protocol = scratch.ip.next;
    Ok(true)
}

#[inline(always)]
fn read_v4<P: Packet>(packet: &P, scratch: &mut Scratch, start: usize) -> Result<(), DropReason> {
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
    scratch.tuple.family = 4;
    // What lies behind the four bytes is zero since the packet began.
    [
        scratch.tuple.source[0],
        scratch.tuple.source[1],
        scratch.tuple.source[2],
        scratch.tuple.source[3],
    ] = [h[12], h[13], h[14], h[15]];
    let destination = &mut scratch.tuple.destination;
    [destination[0], destination[1], destination[2], destination[3]] = [h[16], h[17], h[18], h[19]];
    scratch.ip.source = Address::V4([h[12], h[13], h[14], h[15]]);
    scratch.ip.destination = Address::V4([h[16], h[17], h[18], h[19]]);
    scratch.ip.hops = h[8];
    scratch.ip.next = h[9];
    scratch.ip.start = start;
    scratch.ip.payload = start + header;
    scratch.ip.end = start + total;
    scratch.ip.fragment_field = u16::from_be_bytes([h[6], h[7]]);
    scratch.ip.id = u16::from_be_bytes([h[4], h[5]]);
    Ok(())
}

#[inline(always)]
fn read_v6<P: Packet>(packet: &P, scratch: &mut Scratch, start: usize) -> Result<(), DropReason> {
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
    scratch.tuple.family = 6;
    scratch.tuple.source = source;
    scratch.tuple.destination = destination;
    scratch.ip.source = Address::V6(source);
    scratch.ip.destination = Address::V6(destination);
    scratch.ip.hops = h[7];
    scratch.ip.next = h[6];
    scratch.ip.start = start;
    scratch.ip.payload = start + 40;
    scratch.ip.end = start + 40 + length;
    scratch.ip.fragment_field = 0;
    scratch.ip.id = 0;
    Ok(())
}

impl Ip {
    /// Reads the fixed header of an IP packet; `None` where the frame is not IP.
    #[cfg(test)]
    pub(crate) fn parse<P: Packet>(packet: &P, link: Link) -> Result<Option<Self>, DropReason> {
        let mut scratch = Scratch::default();
        Ok(read(packet, &mut scratch, link)?.then_some(scratch.ip))
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
        for (text, local) in [
            ("fe80::1", true),
            ("fe80:0:0:1::1", false),
            ("fe81::1", false),
            ("ff02::1", false),
        ] {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            assert_eq!(Address::V6(address.octets()).is_link_local_v6(), local, "{text}");
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
