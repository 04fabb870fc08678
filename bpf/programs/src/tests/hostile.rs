//! Hostile packets: fragments, extension headers, tags, truncation.

use warren_abi::DropReason;

use super::packets::*;
use crate::{
    Judgement,
    testing::{TUNNEL_MARK, TUNNEL0, extension, v6, vlan},
};

/// A part of a payload as a fragment; offset in units of eight bytes.
fn fragment(
    family: Family,
    (from, to): (End, End),
    id: u8,
    protocol: u8,
    offset: u16,
    more: bool,
    part: &[u8],
) -> Vec<u8> {
    match family {
        Family::V4 => {
            let mut packet = family.packet(from, to, protocol, part);
            let field = offset | if more { 0x2000 } else { 0 };
            packet[5] = id;
            packet[6..8].copy_from_slice(&field.to_be_bytes());
            packet
        }
        Family::V6 => {
            let field = ((offset << 3) | u16::from(more)).to_be_bytes();
            let header = [protocol, 0, field[0], field[1], 0, 0, 0, id];
            family.packet(from, to, 44, &[&header, part].concat())
        }
    }
}

const IN: (End, End) = (End::Remote, End::Pod);
const OUT: (End, End) = (End::Pod, End::Remote);

fn get(node: &Node, packet: &[u8]) -> Judgement {
    node.pod_gets_remote(packet)
}

#[test]
fn later_fragments_follow_the_first() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Remote, UDP, 53);
        let first = [udp(4000, 53), vec![0; 16]].concat();
        assert!(get(&node, &fragment(family, IN, 1, UDP, 0, true, &first)).is_ok());
        assert!(get(&node, &fragment(family, IN, 1, UDP, 3, true, &[0; 8])).is_ok());
        assert!(get(&node, &fragment(family, IN, 1, UDP, 4, false, &[0; 3])).is_ok());
        assert_eq!(
            dropped(get(&node, &fragment(family, IN, 2, UDP, 3, true, &[0; 8]))),
            DropReason::UnknownFragment,
            "another datagram"
        );
        let other = [udp(4000, 54), vec![0; 16]].concat();
        assert_eq!(
            dropped(get(&node, &fragment(family, IN, 3, UDP, 0, true, &other))),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(get(&node, &fragment(family, IN, 3, UDP, 3, false, &[0; 8]))),
            DropReason::DefaultDeny,
            "of a datagram that is denied"
        );
        node.wait(61);
        assert_eq!(
            dropped(get(&node, &fragment(family, IN, 1, UDP, 5, false, &[0; 8]))),
            DropReason::UnknownFragment,
            "too late"
        );
    }
}

#[test]
fn fragments_out_of_order_and_without_a_first() {
    for family in FAMILIES {
        for protocol in [TCP, UDP, SCTP, family.icmp().0, 47] {
            let node = Node::open();
            for (direction, judge) in [(IN, true), (OUT, false)] {
                let later = fragment(family, direction, 1, protocol, 8, false, &[0; 16]);
                let judged = if judge {
                    get(&node, &later)
                } else {
                    node.pod_sends(&later)
                };
                assert_eq!(dropped(judged), DropReason::UnknownFragment, "{protocol}");
            }
            assert!(node.world.flows().is_empty());
        }
    }
}

#[test]
fn tiny_first_fragments() {
    for family in FAMILIES {
        let whole = [
            (TCP, tcp(4000, 80, SYN)),
            (UDP, udp(4000, 80)),
            (SCTP, sctp(4000, 80, 1)[..12].to_vec()),
            (family.icmp().0, vec![family.icmp().1, 0, 0, 0, 0, 7, 0, 1]),
        ];
        for (protocol, header) in whole {
            let node = Node::open();
            for length in 0..header.len() {
                let packet = fragment(family, IN, 1, protocol, 0, true, &header[..length]);
                assert_eq!(
                    dropped(get(&node, &packet)),
                    DropReason::TinyFragment,
                    "{protocol} {length}"
                );
            }
            let packet = fragment(family, IN, 1, protocol, 0, true, &header);
            assert!(get(&node, &packet).is_ok(), "{protocol}");
        }
    }
}

#[test]
fn fragments_that_would_overwrite_the_header() {
    for family in FAMILIES {
        for (protocol, header, first_good) in [
            (TCP, tcp(4000, 80, SYN), 3),
            (SCTP, sctp(4000, 80, 1), 2),
            (UDP, udp(4000, 80), 1),
        ] {
            let node = Node::open();
            let first = [&header[..], &[0; 24]].concat();
            assert!(get(&node, &fragment(family, IN, 1, protocol, 0, true, &first)).is_ok());
            for offset in 1..6 {
                let packet = fragment(family, IN, 1, protocol, offset, false, &[0; 8]);
                let expected = if offset < first_good {
                    Err(DropReason::OverlappingFragment)
                } else {
                    Ok(TUNNEL_MARK)
                };
                assert_eq!(mark(get(&node, &packet)), expected, "{protocol} {offset}");
            }
        }
    }
}

#[test]
fn a_second_first_fragment_is_judged_by_itself() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Remote, UDP, 53);
        let first = |port| [udp(4000, port), vec![0; 16]].concat();
        assert!(get(&node, &fragment(family, IN, 1, UDP, 0, true, &first(53))).is_ok());
        let forged = fragment(family, IN, 1, UDP, 0, true, &first(54));
        assert_eq!(dropped(get(&node, &forged)), DropReason::DefaultDeny);
        let later = fragment(family, IN, 1, UDP, 3, false, &[0; 8]);
        assert!(get(&node, &later).is_err(), "nobody knows whose it is");
    }
}

#[test]
fn extension_headers_inside_fragments() {
    let node = Node::closed();
    node.allow_in(End::Remote, UDP, 53);
    let inner = extension(60, UDP, 0, &[udp(4000, 53), vec![0; 8]].concat());
    assert!(get(&node, &fragment(Family::V6, IN, 1, 60, 0, true, &inner)).is_ok());
    assert!(get(&node, &fragment(Family::V6, IN, 1, 60, 3, false, &[0; 8])).is_ok());
    let lie = fragment(Family::V6, IN, 1, UDP, 3, false, &[0; 8]);
    assert_eq!(
        dropped(get(&node, &lie)),
        DropReason::UnknownFragment,
        "another protocol, another datagram"
    );
    let cut = fragment(Family::V6, IN, 2, 60, 0, true, &inner[..8]);
    assert_eq!(
        dropped(get(&node, &cut)),
        DropReason::TinyFragment,
        "the chain is not whole (RFC 7112)"
    );
}

#[test]
fn extension_headers_hide_nothing() {
    let kinds = [0, 60, 43, 51, 135, 139, 140];
    let node = Node::closed();
    node.allow_in(End::Remote, TCP, 80);
    for rotation in 0..kinds.len() {
        for count in 0..=kinds.len() {
            for (port, passes) in [(80, true), (81, false)] {
                let mut payload = tcp(4000, port, SYN);
                let mut next = TCP;
                for kind in kinds.iter().cycle().skip(rotation).take(count) {
                    payload = extension(*kind, next, 1, &payload);
                    next = *kind;
                }
                let packet = v6("fd00:10:244:2::9", "fd00:10:244:1::2", next, &payload);
                assert_eq!(get(&node, &packet).is_ok(), passes, "{rotation} {count} {port}");
            }
        }
    }
}

#[test]
fn every_truncation_is_dropped_everywhere() {
    for family in FAMILIES {
        for (protocol, payload) in [
            (TCP, tcp(4000, 80, SYN)),
            (UDP, udp(4000, 80)),
            (SCTP, sctp(4000, 80, 1)[..12].to_vec()),
        ] {
            let node = Node::open();
            node.world.close(0);
            for end in [End::Remote, End::World] {
                for length in 0..payload.len() {
                    let packet = family.packet(end, End::Pod, protocol, &payload[..length]);
                    assert_eq!(
                        dropped(node.pod_gets(&packet, TUNNEL_MARK, TUNNEL0)),
                        DropReason::Truncated
                    );
                    let packet = family.packet(end, End::Host, protocol, &payload[..length]);
                    assert_eq!(
                        dropped(node.socket_gets(&packet, 0, ELSEWHERE)),
                        DropReason::Truncated
                    );
                    let packet = family.packet(End::Pod, end, protocol, &payload[..length]);
                    assert_eq!(dropped(node.pod_sends(&packet)), DropReason::Truncated);
                }
            }
            assert!(node.world.flows().is_empty());
        }
        let mut header = tcp(4000, 80, SYN);
        header[12] = 0x40;
        let node = Node::open();
        let packet = family.packet(End::Pod, End::Remote, TCP, &header);
        assert_eq!(
            dropped(node.pod_sends(&packet)),
            DropReason::Malformed,
            "a header of 16 bytes"
        );
    }
}

#[test]
fn tags_hide_nothing_from_host_policy() {
    use crate::{
        Meta, barrier_in,
        testing::{UNDERLAY, ethernet, run},
    };
    for family in FAMILIES {
        let node = Node::open();
        node.world.close(0);
        let ping = family.echo(End::World, End::Host, 7, false);
        let ethertype = if family == Family::V4 { 0x0800 } else { 0x86dd };
        let mut frame = ethernet(ethertype, &ping);
        for _ in 0..3 {
            let meta = Meta {
                ifindex: UNDERLAY,
                ingress_ifindex: UNDERLAY,
                ..Meta::default()
            };
            assert_eq!(
                dropped(run(barrier_in, &frame, &node.world, &meta)),
                DropReason::DefaultDeny
            );
            frame = vlan(0x8100, &frame);
        }
    }
}

#[test]
fn spoofed_senders_make_no_flows() {
    for family in FAMILIES {
        let node = Node::open();
        for protocol in [TCP, UDP] {
            let payload = if protocol == TCP {
                tcp(4000, 80, SYN)
            } else {
                udp(4000, 80)
            };
            for from in [End::Peer, End::Host, End::World, End::Service, End::Remote] {
                let packet = family.packet(from, End::Remote, protocol, &payload);
                assert_eq!(dropped(node.pod_sends(&packet)), DropReason::SpoofedAddress);
            }
        }
        assert!(node.world.flows().is_empty());
    }
}
