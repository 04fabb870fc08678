//! What is told of packets.

use warren_abi::{DropReason, Event, Hook, Outcome};

use super::packets::*;
use crate::testing::{PEER_IDENTITY, POD_IDENTITY, POD_INDEX, POD_MARK};

fn only(node: &Node) -> Event {
    let events = node.world.events.borrow();
    assert_eq!(events.len(), 1, "{events:?}");
    events[0]
}

#[test]
fn a_new_flow_is_told_once() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Peer, TCP, 80);
        for flags in [SYN, ACK, ACK] {
            let packet = family.packet(End::Peer, End::Pod, TCP, &tcp(4000, 80, flags));
            assert!(node.pod_gets(&packet, PEER_JUDGED, ELSEWHERE).is_ok());
        }
        let event = only(&node);
        assert_eq!(
            (event.source_identity, event.destination_identity),
            (PEER_IDENTITY, POD_IDENTITY)
        );
        assert_eq!(
            (event.source_port, event.destination_port, event.protocol),
            (4000, 80, TCP)
        );
        assert_eq!((event.endpoint, event.direction), (POD_INDEX, 0));
        assert_eq!(
            (event.hook, event.outcome),
            (Hook::ToPod as u8, Outcome::Allowed as u8)
        );
        assert_eq!(
            (event.rule, event.packets, event.tcp_flags),
            (70 + PEER_IDENTITY, 1, SYN)
        );
        assert_eq!(event.family, if family == Family::V4 { 4 } else { 6 });
    }
}

#[test]
fn denials_are_told_together() {
    let node = Node::closed();
    let packet = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    for _ in 0..5 {
        assert_eq!(dropped(node.pod_sends(&packet)), DropReason::DefaultDeny);
    }
    let event = only(&node);
    assert_eq!((event.packets, event.reason), (1, DropReason::DefaultDeny as u8));
    assert_eq!(
        (event.source_identity, event.destination_identity),
        (POD_IDENTITY, REMOTE_IDENTITY)
    );
    assert_eq!((event.direction, event.outcome), (1, Outcome::Dropped as u8));
    node.wait(1);
    assert!(node.pod_sends(&packet).is_err());
    assert_eq!(
        node.world.events.borrow()[1].packets,
        5,
        "the four before and itself"
    );
    let other = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 54));
    assert!(node.pod_sends(&other).is_err());
    assert_eq!(
        node.world.events.borrow().len(),
        3,
        "another port is another event"
    );
}

#[test]
fn a_rule_that_denies_is_named() {
    let node = Node::closed();
    node.world.rule(POD_INDEX, 1, (UDP, 53), REMOTE_IDENTITY, false);
    let packet = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    assert_eq!(dropped(node.pod_sends(&packet)), DropReason::Policy);
    assert_eq!(only(&node).rule, 70 + REMOTE_IDENTITY);
}

#[test]
fn other_drops_ask_nobody() {
    let node = Node::closed();
    let spoofed = Family::V4.packet(End::Peer, End::Remote, UDP, &udp(4000, 53));
    assert_eq!(dropped(node.pod_sends(&spoofed)), DropReason::SpoofedAddress);
    let event = only(&node);
    assert_eq!((event.endpoint, event.direction, event.rule), (0xffff, 2, 0));
    assert_eq!(event.source[..4], [10, 244, 1, 3]);
    let node = Node::open();
    let leak = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    assert_eq!(
        dropped(node.leaves(&leak, POD_MARK, ELSEWHERE)),
        DropReason::CleartextOut
    );
    assert_eq!(only(&node).hook, Hook::BarrierOut as u8);
    let node = Node::open();
    assert_eq!(dropped(node.pod_gets(&[0x45; 7], 0, 0)), DropReason::Truncated);
    assert_eq!(only(&node).family, 0);
}

#[test]
fn icmp_tells_type_and_code() {
    for family in FAMILIES {
        let node = Node::closed();
        assert!(
            node.pod_sends(&family.echo(End::Pod, End::Remote, 0x1234, false))
                .is_err()
        );
        let event = only(&node);
        assert_eq!(
            (event.source_port, event.destination_port),
            (family.icmp().1.into(), 0)
        );
    }
}
