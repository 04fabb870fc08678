//! IPv6 control messages from a pod: neighbour discovery (RFC 4861) and multicast listener discovery (RFC 2710,
//! 3810). A pod speaks for itself only and is no router.

use warren_abi::{DropReason, EndpointValue};

use crate::{
    Fragment, Ip, Packet, Transport,
    endpoint::{is_link_local, owns_v6},
    transport::ICMPV6,
};

const LISTENER_QUERY: u8 = 130;
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_REPORT_V2: u8 = 143;

/// Options that carry a link-layer address.
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// Options that are looked at; a message with more is refused.
const MAX_OPTIONS: usize = 8;

/// Neighbour and listener discovery, which policy does not judge: without it no other packet finds its way. Such a
/// message cannot have crossed a router; one that did is a message like any other.
#[inline(always)]
pub(crate) fn is_discovery<P: Packet>(packet: &P, ip: &Ip, transport: &Transport) -> bool {
    if transport.protocol != ICMPV6 || !matches!(transport.fragment, Fragment::Whole) {
        return false;
    }
    let Ok([kind]) = ip.load::<1, _>(packet, transport.offset) else {
        return false;
    };
    match kind {
        ROUTER_SOLICITATION..=REDIRECT => ip.hops == 255,
        LISTENER_QUERY..=LISTENER_DONE | LISTENER_REPORT_V2 => ip.hops == 1,
        _ => false,
    }
}

/// Checks the source of an IPv6 packet of a pod, and what it claims in neighbour discovery.
#[inline(always)]
pub(crate) fn check<P: Packet>(
    packet: &P,
    ip: &Ip,
    source: &[u8; 16],
    transport: &Transport,
    endpoint: &EndpointValue,
) -> Result<(), DropReason> {
    let own = owns_v6(endpoint, source);
    if transport.protocol != ICMPV6 || matches!(transport.fragment, Fragment::Later) {
        return if own {
            Ok(())
        } else {
            Err(DropReason::SpoofedAddress)
        };
    }
    let [kind, code] = ip.load::<2, _>(packet, transport.offset)?;
    check_source(kind, source, own)?;
    match kind {
        ROUTER_ADVERTISEMENT | REDIRECT => Err(DropReason::RogueRouter),
        ROUTER_SOLICITATION => {
            check_envelope(ip, code, transport)?;
            check_options(packet, ip, transport.offset + 8, SOURCE_LINK_ADDRESS, endpoint)
        }
        NEIGHBOUR_SOLICITATION => {
            check_envelope(ip, code, transport)?;
            check_options(packet, ip, transport.offset + 24, SOURCE_LINK_ADDRESS, endpoint)
        }
        NEIGHBOUR_ADVERTISEMENT => {
            check_envelope(ip, code, transport)?;
            let target = ip.load::<16, _>(packet, transport.offset + 8)?;
            if !owns_v6(endpoint, &target) && !is_link_local(&target) {
                return Err(DropReason::SpoofedNeighbour);
            }
            check_options(packet, ip, transport.offset + 24, TARGET_LINK_ADDRESS, endpoint)
        }
        _ => Ok(()),
    }
}

/// Its own address for everything; a link-local one for neighbour and listener discovery; none while it looks
/// whether its address is free.
#[inline(always)]
fn check_source(kind: u8, source: &[u8; 16], own: bool) -> Result<(), DropReason> {
    let allowed = own
        || match kind {
            ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION | LISTENER_REPORT | LISTENER_REPORT_V2 => {
                is_link_local(source) || *source == [0; 16]
            }
            ROUTER_ADVERTISEMENT | NEIGHBOUR_ADVERTISEMENT | REDIRECT | LISTENER_QUERY | LISTENER_DONE => {
                is_link_local(source)
            }
            _ => false,
        };
    if allowed {
        Ok(())
    } else {
        Err(DropReason::SpoofedAddress)
    }
}

/// Receivers ignore messages that crossed a router (RFC 4861) or are in fragments (RFC 6980).
#[inline(always)]
fn check_envelope(ip: &Ip, code: u8, transport: &Transport) -> Result<(), DropReason> {
    match transport.fragment {
        Fragment::Whole if ip.hops == 255 && code == 0 => Ok(()),
        Fragment::Whole | Fragment::First | Fragment::Later => Err(DropReason::Malformed),
    }
}

/// A link-layer address in an option of this kind must be the pod's.
#[inline(always)]
fn check_options<P: Packet>(
    packet: &P,
    ip: &Ip,
    start: usize,
    link_address: u8,
    endpoint: &EndpointValue,
) -> Result<(), DropReason> {
    // The message itself must be whole, also where it has no option.
    if start > ip.end {
        return Err(DropReason::Truncated);
    }
    let mut offset = start;
    for _ in 0..MAX_OPTIONS {
        if offset == ip.end {
            return Ok(());
        }
        let [kind, units] = ip.load::<2, _>(packet, offset)?;
        if units == 0 {
            return Err(DropReason::Malformed);
        }
        if kind == link_address {
            let mac = ip.load::<6, _>(packet, offset + 2)?;
            if mac != endpoint.mac {
                return Err(DropReason::SpoofedNeighbour);
            }
        }
        offset = packet.forget(offset + usize::from(units) * 8);
    }
    if offset == ip.end {
        Ok(())
    } else {
        Err(DropReason::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Address, Link, Network,
        testing::{Bytes, POD_MAC, POD_V6, endpoint, extension, fragment_header, icmp6, octets, v6},
    };

    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
    const LINK: &str = "fe80::42";

    fn judge(bytes: &[u8]) -> Result<(), DropReason> {
        let packet = Bytes(bytes);
        let ip = Ip::parse(
            &packet,
            Link {
                network: Network::V6,
                offset: 0,
            },
        )?
        .expect("is IPv6");
        let transport = Transport::parse(&packet, &ip)?;
        let Address::V6(source) = ip.source else {
            panic!("is IPv6")
        };
        check(&packet, &ip, &source, &transport, &endpoint())
    }

    fn solicitation(from: &str, mac: Option<[u8; 6]>) -> Vec<u8> {
        icmp6(from, 135, 255, &octets("fd00::99"), mac.map(|mac| (1, mac)))
    }

    fn advertisement(from: &str, target: &str, mac: Option<[u8; 6]>) -> Vec<u8> {
        icmp6(from, 136, 255, &octets(target), mac.map(|mac| (2, mac)))
    }

    #[test]
    fn own_address_for_everything() {
        assert_eq!(judge(&v6(POD_V6, "fd00::9", 17, &[0; 8])), Ok(()));
        assert_eq!(
            judge(&v6("fd00:10:244:1::3", "fd00::9", 17, &[0; 8])),
            Err(DropReason::SpoofedAddress)
        );
        assert_eq!(
            judge(&v6(LINK, "fe80::1", 17, &[0; 8])),
            Err(DropReason::SpoofedAddress)
        );
        assert_eq!(
            judge(&v6("::", "fd00::9", 17, &[0; 8])),
            Err(DropReason::SpoofedAddress)
        );
        assert_eq!(
            judge(&icmp6(LINK, 128, 64, &[0; 4], None)),
            Err(DropReason::SpoofedAddress),
            "echo"
        );
        assert_eq!(judge(&icmp6(POD_V6, 128, 64, &[0; 4], None)), Ok(()), "echo");
    }

    #[test]
    fn solicitations() {
        for from in [POD_V6, LINK] {
            assert_eq!(judge(&solicitation(from, Some(POD_MAC))), Ok(()));
            assert_eq!(judge(&solicitation(from, None)), Ok(()));
            assert_eq!(
                judge(&solicitation(from, Some(OTHER_MAC))),
                Err(DropReason::SpoofedNeighbour)
            );
        }
        assert_eq!(
            judge(&solicitation("::", None)),
            Ok(()),
            "duplicate address detection"
        );
        assert_eq!(
            judge(&solicitation("fd00:10:244:1::3", None)),
            Err(DropReason::SpoofedAddress)
        );
    }

    #[test]
    fn advertisements() {
        assert_eq!(judge(&advertisement(POD_V6, POD_V6, Some(POD_MAC))), Ok(()));
        assert_eq!(judge(&advertisement(LINK, LINK, Some(POD_MAC))), Ok(()));
        assert_eq!(
            judge(&advertisement(POD_V6, "fd00:10:244:1::1", Some(POD_MAC))),
            Err(DropReason::SpoofedNeighbour),
            "the gateway's address"
        );
        assert_eq!(
            judge(&advertisement(POD_V6, POD_V6, Some(OTHER_MAC))),
            Err(DropReason::SpoofedNeighbour)
        );
        assert_eq!(
            judge(&advertisement("::", POD_V6, Some(POD_MAC))),
            Err(DropReason::SpoofedAddress)
        );
    }

    #[test]
    fn a_pod_is_no_router() {
        for kind in [134, 137] {
            for from in [POD_V6, LINK] {
                assert_eq!(
                    judge(&icmp6(from, kind, 255, &[0; 16], None)),
                    Err(DropReason::RogueRouter)
                );
            }
        }
        assert_eq!(
            judge(&icmp6(LINK, 133, 255, &[], Some((1, POD_MAC)))),
            Ok(()),
            "router solicitation"
        );
        assert_eq!(judge(&icmp6("::", 133, 255, &[], None)), Ok(()));
    }

    #[test]
    fn listener_reports_behind_their_router_alert() {
        let report = icmp6(LINK, 143, 1, &[0; 20], None);
        let packet = v6(LINK, "ff02::16", 0, &extension(0, 58, 0, &report[40..]));
        assert_eq!(judge(&packet), Ok(()));
        let packet = v6("::", "ff02::16", 0, &extension(0, 58, 0, &report[40..]));
        assert_eq!(judge(&packet), Ok(()));
    }

    #[test]
    fn forged_envelopes() {
        let mut routed = solicitation(POD_V6, None);
        routed[7] = 64;
        assert_eq!(judge(&routed), Err(DropReason::Malformed), "hop limit");
        let message = advertisement(POD_V6, POD_V6, None);
        let fragment = v6(
            POD_V6,
            "ff02::1",
            44,
            &fragment_header(58, 0, true, &message[40..]),
        );
        assert_eq!(judge(&fragment), Err(DropReason::Malformed), "RFC 6980");
    }

    #[test]
    fn options_are_walked_to_the_end() {
        let mut message = advertisement(POD_V6, POD_V6, None);
        message.extend_from_slice(&[14, 1, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(&[2, 1, 2, 0, 0, 0, 0, 9]);
        message[5] += 16;
        assert_eq!(
            judge(&message),
            Err(DropReason::SpoofedNeighbour),
            "second option"
        );
        let at = message.len() - 16;
        message[at + 1] = 0;
        assert_eq!(
            judge(&message),
            Err(DropReason::Malformed),
            "option without length"
        );
        message[at + 1] = 3;
        assert_eq!(
            judge(&message),
            Err(DropReason::Truncated),
            "option longer than the packet"
        );
        let mut many = advertisement(POD_V6, POD_V6, None);
        for _ in 0..9 {
            many.extend_from_slice(&[14, 1, 0, 0, 0, 0, 0, 0]);
            many[5] += 8;
        }
        assert_eq!(
            judge(&many),
            Err(DropReason::Malformed),
            "more options than are looked at"
        );
    }

    #[test]
    fn every_truncation_is_an_error() {
        let message = advertisement(POD_V6, POD_V6, Some(POD_MAC));
        for length in 0..message.len() - 40 {
            let packet = v6(POD_V6, "ff02::1", 58, &message[40..40 + length]);
            let mut packet = packet;
            packet[7] = 255;
            if length == 24 {
                assert_eq!(judge(&packet), Ok(()), "whole, without option");
            } else {
                assert_eq!(judge(&packet), Err(DropReason::Truncated), "{length}");
            }
        }
    }
}
