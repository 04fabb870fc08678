//! What lies behind the IP header: IPv6 extension headers, IPv4 options, fragments, ports.

use warren_abi::DropReason;

use crate::{Address, Ip, Packet};

/// Extension headers that are looked through. RFC 8200 knows seven at most in a sensible packet.
const MAX_EXTENSIONS: usize = 8;
/// IPv4 options end after 40 bytes.
const MAX_OPTION_BYTES: usize = 40;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMPV6: u8 = 58;

/// Whether a packet is a part of another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// It is whole.
    #[default]
    Whole,
    /// The first part: has the transport header.
    First,
    /// A later part: has none.
    Later,
}

/// The transport header of a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transport {
    /// IP protocol number.
    pub protocol: u8,
    /// Offset of its header; of the payload for [`Fragment::Later`].
    pub offset: usize,
    /// Whether it is there.
    pub fragment: Fragment,
    /// Where the fragment's payload belongs, in units of eight bytes; 0 where it is none.
    pub fragment_offset: u16,
    /// Identification of the datagram; 0 for IPv6 that is not in fragments.
    pub fragment_id: u32,
    /// What the fragments say their payload is: `protocol`, but for IPv6 also an extension header.
    pub fragment_protocol: u8,
}

/// Protocols with ports that policy and the stack's translation know.
#[inline(always)]
pub(crate) const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

impl Transport {
    /// Walks from the IP header to the transport header. Extension headers may come in any order, as a hostile
    /// sender may send them.
    #[inline(always)]
    pub fn parse<P: Packet>(packet: &P, ip: &Ip) -> Result<Self, DropReason> {
        match ip.source {
            Address::V4(_) => Self::v4(packet, ip),
            Address::V6(_) => Self::v6(packet, ip),
        }
    }

    #[inline(always)]
    fn v4<P: Packet>(packet: &P, ip: &Ip) -> Result<Self, DropReason> {
        refuse_source_route(packet, ip)?;
        let fragment = match (ip.fragment_field & 0x1fff, ip.fragment_field & 0x2000) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            protocol: ip.next,
            offset: ip.payload,
            fragment,
            fragment_offset: ip.fragment_field & 0x1fff,
            fragment_id: u32::from(ip.id),
            fragment_protocol: ip.next,
        })
    }

    #[inline(always)]
    fn v6<P: Packet>(packet: &P, ip: &Ip) -> Result<Self, DropReason> {
        let mut next = ip.next;
        let mut offset = ip.payload;
        let mut fragment = Fragment::Whole;
        let mut fragment_id = 0;
        let mut fragment_protocol = 0;
        for _ in 0..MAX_EXTENSIONS {
            let length = match next {
                HOP_BY_HOP | DESTINATION | MOBILITY | HOST_IDENTITY | SHIM6 | ROUTING => {
                    let [_, units, _, segments_left] = ip.load::<4, _>(packet, offset)?;
                    if next == ROUTING && segments_left != 0 {
                        return Err(DropReason::SourceRoute);
                    }
                    (usize::from(units) + 1) * 8
                }
                AUTHENTICATION => {
                    let [_, units] = ip.load::<2, _>(packet, offset)?;
                    (usize::from(units) + 2) * 4
                }
                FRAGMENT => {
                    let h = ip.load::<8, _>(packet, offset)?;
                    let field = u16::from_be_bytes([h[2], h[3]]);
                    let id = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
                    if field & 0xfff8 != 0 {
                        return Ok(Self {
                            protocol: h[0],
                            offset: offset + 8,
                            fragment: Fragment::Later,
                            fragment_offset: field >> 3,
                            fragment_id: id,
                            fragment_protocol: h[0],
                        });
                    }
                    if field & 1 != 0 {
                        fragment = Fragment::First;
                        fragment_id = id;
                        fragment_protocol = h[0];
                    }
                    8
                }
                _ => {
                    return Ok(Self {
                        protocol: next,
                        offset,
                        fragment,
                        fragment_offset: 0,
                        fragment_id,
                        fragment_protocol,
                    });
                }
            };
            let [following] = ip.load::<1, _>(packet, offset)?;
            next = following;
            offset = packet.forget(offset + length);
            if offset > ip.end {
                return Err(DropReason::Truncated);
            }
        }
        match next {
            HOP_BY_HOP | DESTINATION | MOBILITY | HOST_IDENTITY | SHIM6 | ROUTING | AUTHENTICATION
            | FRAGMENT => Err(DropReason::ExtensionHeaders),
            _ => Ok(Self {
                protocol: next,
                offset,
                fragment,
                fragment_offset: 0,
                fragment_id,
                fragment_protocol,
            }),
        }
    }
}

/// Loose and strict source route (RFC 791): the destination in the header is not the last.
#[inline(always)]
fn refuse_source_route<P: Packet>(packet: &P, ip: &Ip) -> Result<(), DropReason> {
    let mut offset = ip.start + 20;
    for _ in 0..MAX_OPTION_BYTES {
        if offset >= ip.payload {
            return Ok(());
        }
        let [kind] = ip.load::<1, _>(packet, offset)?;
        match kind {
            0 => return Ok(()),
            1 => offset = packet.forget(offset + 1),
            131 | 137 => return Err(DropReason::SourceRoute),
            _ => {
                let [length] = ip.load::<1, _>(packet, offset + 1)?;
                if length < 2 || offset + usize::from(length) > ip.payload {
                    return Err(DropReason::Malformed);
                }
                offset = packet.forget(offset + usize::from(length));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Link, Network,
        testing::{Bytes, extension, fragment_header, v4, v4_with_options, v6},
    };

    fn parse(bytes: &[u8]) -> Result<(Transport, (u16, u16)), DropReason> {
        let network = if bytes[0] >> 4 == 4 {
            Network::V4
        } else {
            Network::V6
        };
        let packet = Bytes(bytes);
        let ip = Ip::parse(&packet, Link { network, offset: 0 })?.expect("is IP");
        let transport = Transport::parse(&packet, &ip)?;
        let ports = match (has_ports(transport.protocol), transport.fragment) {
            (true, Fragment::Whole | Fragment::First) => {
                let p = ip.load::<4, _>(&packet, transport.offset)?;
                (u16::from_be_bytes([p[0], p[1]]), u16::from_be_bytes([p[2], p[3]]))
            }
            (_, Fragment::Later | Fragment::Whole | Fragment::First) => (0, 0),
        };
        Ok((transport, ports))
    }

    const PORTS: [u8; 8] = [0x30, 0x39, 0, 80, 0, 8, 0, 0];

    #[test]
    fn extension_headers_in_any_order() {
        let kinds = [
            HOP_BY_HOP,
            DESTINATION,
            ROUTING,
            AUTHENTICATION,
            MOBILITY,
            HOST_IDENTITY,
            SHIM6,
        ];
        for rotation in 0..kinds.len() {
            for count in 0..=kinds.len() {
                let mut payload = PORTS.to_vec();
                let mut next = UDP;
                for kind in kinds.iter().cycle().skip(rotation).take(count) {
                    payload = extension(*kind, next, 1, &payload);
                    next = *kind;
                }
                let packet = v6("fd00::2", "fd00::3", next, &payload);
                let (transport, ports) = parse(&packet).unwrap();
                assert_eq!(transport.protocol, UDP);
                assert_eq!(ports, (12345, 80));
                assert_eq!(transport.offset, packet.len() - 8);
            }
        }
    }

    #[test]
    fn the_walk_is_bounded() {
        let chain = |count| {
            let mut payload = PORTS.to_vec();
            let mut next = UDP;
            for _ in 0..count {
                payload = extension(DESTINATION, next, 0, &payload);
                next = DESTINATION;
            }
            parse(&v6("fd00::2", "fd00::3", next, &payload)).map(|(transport, _)| transport.protocol)
        };
        assert_eq!(chain(8), Ok(UDP));
        assert_eq!(chain(9), Err(DropReason::ExtensionHeaders));
        assert_eq!(chain(64), Err(DropReason::ExtensionHeaders));
    }

    #[test]
    fn every_truncation_inside_the_chain_is_an_error() {
        let payload = extension(
            HOP_BY_HOP,
            DESTINATION,
            0,
            &extension(DESTINATION, UDP, 2, &PORTS),
        );
        for length in 0..payload.len() - 4 {
            let packet = v6("fd00::2", "fd00::3", HOP_BY_HOP, &payload[..length]);
            assert_eq!(parse(&packet), Err(DropReason::Truncated), "{length}");
        }
    }

    #[test]
    fn a_header_longer_than_the_packet() {
        let long = |next: u8| {
            parse(&v6(
                "fd00::2",
                "fd00::3",
                DESTINATION,
                &[next, 1, 0, 0, 0, 0, 0, 0],
            ))
        };
        assert_eq!(long(UDP), Err(DropReason::Truncated));
        assert_eq!(long(59), Err(DropReason::Truncated), "also where nothing follows");
        assert!(parse(&v6("fd00::2", "fd00::3", DESTINATION, &[59, 0, 0, 0, 0, 0, 0, 0])).is_ok());
    }

    #[test]
    fn a_header_in_the_padding_is_none() {
        // The stack trims to the length field: what a parser reads behind it, nobody else sees.
        let mut packet = v6("fd00::2", "fd00::3", UDP, &[]);
        packet.extend_from_slice(&PORTS);
        assert_eq!(parse(&packet), Err(DropReason::Truncated));
    }

    #[test]
    fn routing_header_with_segments_left() {
        let mut routing = extension(ROUTING, UDP, 0, &PORTS);
        assert!(
            parse(&v6("fd00::2", "fd00::3", ROUTING, &routing)).is_ok(),
            "none left: it is the destination"
        );
        routing[3] = 1;
        assert_eq!(
            parse(&v6("fd00::2", "fd00::3", ROUTING, &routing)),
            Err(DropReason::SourceRoute)
        );
    }

    #[test]
    fn fragments_of_ipv6() {
        let first = fragment_header(UDP, 0, true, &PORTS);
        let (transport, ports) = parse(&v6("fd00::2", "fd00::3", FRAGMENT, &first)).unwrap();
        assert_eq!((transport.fragment, ports), (Fragment::First, (12345, 80)));
        let later = fragment_header(UDP, 1, false, &PORTS);
        let (transport, ports) = parse(&v6("fd00::2", "fd00::3", FRAGMENT, &later)).unwrap();
        assert_eq!((transport.fragment, ports), (Fragment::Later, (0, 0)));
        let atomic = fragment_header(UDP, 0, false, &PORTS);
        let (transport, _) = parse(&v6("fd00::2", "fd00::3", FRAGMENT, &atomic)).unwrap();
        assert_eq!(transport.fragment, Fragment::Whole);
        let tiny = fragment_header(DESTINATION, 0, true, &[UDP, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            parse(&v6("fd00::2", "fd00::3", FRAGMENT, &tiny)),
            Err(DropReason::Truncated),
            "RFC 7112"
        );
    }

    #[test]
    fn fragments_of_ipv4() {
        let fragment = |field: u16| {
            let mut packet = v4([10, 1, 0, 2], [10, 1, 1, 3], UDP, &PORTS);
            packet[6..8].copy_from_slice(&field.to_be_bytes());
            parse(&packet).map(|(transport, ports)| (transport.fragment, ports.1))
        };
        assert_eq!(fragment(0x4000), Ok((Fragment::Whole, 80)));
        assert_eq!(fragment(0x2000), Ok((Fragment::First, 80)));
        assert_eq!(fragment(0x2001), Ok((Fragment::Later, 0)));
        assert_eq!(fragment(0x0001), Ok((Fragment::Later, 0)));
    }

    #[test]
    fn options_of_ipv4() {
        let options = |bytes: &[u8]| parse(&v4_with_options(UDP, bytes, &PORTS)).map(|(_, ports)| ports.1);
        assert_eq!(options(&[1, 1, 1, 1]), Ok(80), "no operation");
        assert_eq!(options(&[0x94, 4, 0, 0]), Ok(80), "router alert");
        assert_eq!(options(&[0, 131, 7, 4]), Ok(80), "after the end of options");
        assert_eq!(
            options(&[131, 7, 4, 10, 0, 0, 1, 0]),
            Err(DropReason::SourceRoute)
        );
        assert_eq!(
            options(&[1, 137, 7, 4, 10, 0, 0, 1]),
            Err(DropReason::SourceRoute)
        );
        assert_eq!(options(&[7, 0, 0, 0]), Err(DropReason::Malformed), "no length");
        assert_eq!(
            options(&[7, 5, 0, 0]),
            Err(DropReason::Malformed),
            "longer than the header"
        );
        assert_eq!(options(&[1; 40]), Ok(80));
    }

    #[test]
    fn ports_only_where_there_are_some() {
        assert_eq!(
            parse(&v4([10, 1, 0, 2], [10, 1, 1, 3], 1, &[])).map(|(_, ports)| ports),
            Ok((0, 0))
        );
        assert_eq!(
            parse(&v4([10, 1, 0, 2], [10, 1, 1, 3], TCP, &[0; 3])),
            Err(DropReason::Truncated)
        );
    }
}
