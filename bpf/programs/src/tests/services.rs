//! Translation by the stack: services, NodePorts, masquerade.

use warren_abi::{DropReason, FLOW_JUDGED};

use super::packets::*;
use crate::testing::{PEER_MARK, POD_INDEX, POD_MARK, TUNNEL_MARK, TUNNEL0};

#[test]
fn a_service_is_judged_on_its_final_address() {
    for family in FAMILIES {
        let node = Node::closed();
        let call = family.packet(End::Pod, End::Service, TCP, &tcp(4000, 80, SYN));
        let translated = family.packet(End::Pod, End::Remote, TCP, &tcp(4000, 8080, SYN));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK), "not judged yet");
        assert_eq!(
            dropped(node.leaves_by_tunnel(&translated, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        node.allow_out(End::Remote, TCP, 8080);
        assert_eq!(
            mark(node.leaves_by_tunnel(&translated, POD_MARK, ELSEWHERE)),
            Ok(POD_JUDGED)
        );
        let answer = family.packet(End::Service, End::Pod, TCP, &tcp(80, 4000, SYN | ACK));
        assert!(node.pod_gets(&answer, TUNNEL_MARK, TUNNEL0).is_ok());
        let (flows, judged): (Vec<_>, Vec<_>) = node
            .world
            .flows()
            .into_iter()
            .partition(|(_, value)| value.flags & FLOW_JUDGED == 0);
        assert_eq!((flows.len(), judged.len()), (1, 1), "two entries");
        let other = family.packet(End::Service, End::Pod, TCP, &tcp(80, 4001, SYN | ACK));
        assert_eq!(
            dropped(node.pod_gets(&other, TUNNEL_MARK, TUNNEL0)),
            DropReason::DefaultDeny
        );
        let call = family.packet(End::Service, End::Pod, TCP, &tcp(80, 4000, SYN));
        assert_eq!(
            dropped(node.pod_gets(&call, TUNNEL_MARK, TUNNEL0)),
            DropReason::DefaultDeny,
            "no reply"
        );
    }
}

#[test]
fn a_service_of_this_node() {
    for family in FAMILIES {
        let node = Node::closed();
        let translated = family.packet(End::Pod, End::Peer, TCP, &tcp(4000, 8080, SYN));
        assert_eq!(
            dropped(node.peer_gets(&translated, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        node.allow_out(End::Peer, TCP, 8080);
        assert_eq!(
            mark(node.peer_gets(&translated, POD_MARK, ELSEWHERE)),
            Ok(POD_JUDGED)
        );
        let answer = family.packet(End::Peer, End::Pod, TCP, &tcp(8080, 4000, SYN | ACK));
        assert_eq!(mark(node.peer_sends(&answer)), Ok(PEER_JUDGED));
    }
}

#[test]
fn masqueraded_pods_are_pods_still() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Host, TCP, 80);
        // The peer by its own node's NodePort: the packet shows the node's address.
        let packet = family.packet(End::Host, End::Pod, TCP, &tcp(4000, 80, SYN));
        assert_eq!(
            dropped(node.pod_gets(&packet, PEER_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(node.pod_gets(&packet, 0, ELSEWHERE)),
            DropReason::DefaultDeny,
            "forwarded with this node's address: the world"
        );
        assert_eq!(
            dropped(node.pod_gets(&packet, TUNNEL_MARK, ELSEWHERE)),
            DropReason::DefaultDeny,
            "somebody behind another node"
        );
        assert!(node.pod_gets(&packet, 0, 0).is_ok(), "the host");
        let again = family.packet(End::Host, End::Pod, TCP, &tcp(4000, 80, ACK));
        assert!(node.pod_gets(&again, 0, 0).is_ok());
        for (mark, ingress) in [
            (PEER_MARK, ELSEWHERE),
            (PEER_JUDGED, ELSEWHERE),
            (0, ELSEWHERE),
            (TUNNEL_MARK, ELSEWHERE),
        ] {
            assert_eq!(
                dropped(node.pod_gets(&again, mark, ingress)),
                DropReason::DefaultDeny,
                "the host's flow is nobody else's: {mark:#x} {ingress}"
            );
        }
        node.allow_in(End::Peer, TCP, 80);
        assert!(
            node.pod_gets(&packet, PEER_MARK, ELSEWHERE).is_ok(),
            "allowed as what it is"
        );
    }
}

#[test]
fn prefixes_are_asked_for_the_pods_own_address() {
    let node = Node::closed();
    let class = node.world.rule(POD_INDEX, 0, (TCP, 80), 9999, true);
    // The peer's first address, as a member of the mesh.
    let prefix = "10.244.1.33".parse().unwrap();
    node.world.prefixes.borrow_mut().push((1, prefix, 32, 40));
    let key = |kind| warren_abi::VerdictKey { class, kind, id: 40 };
    node.world
        .verdicts
        .borrow_mut()
        .insert(key(2), warren_abi::VerdictValue { allow: 1, rule: 5 });
    let packet = Family::V4.packet(End::Host, End::Pod, TCP, &tcp(4000, 80, SYN));
    assert_eq!(
        dropped(node.pod_gets(&packet, PEER_JUDGED, ELSEWHERE)),
        DropReason::DefaultDeny,
        "not the world"
    );
    node.world
        .verdicts
        .borrow_mut()
        .insert(key(3), warren_abi::VerdictValue { allow: 1, rule: 6 });
    assert!(node.pod_gets(&packet, PEER_JUDGED, ELSEWHERE).is_ok());
    assert_eq!(node.world.flows()[0].1.rule, 6);
}

#[test]
fn the_world_by_masquerade() {
    for family in FAMILIES {
        let mut node = Node::closed();
        let call = family.packet(End::Pod, End::World, TCP, &tcp(4000, 443, SYN));
        let masqueraded = family.packet(End::Host, End::World, TCP, &tcp(50_000, 443, SYN));
        let answer = family.packet(End::World, End::Pod, TCP, &tcp(443, 4000, SYN | ACK));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
        assert_eq!(
            dropped(node.leaves(&masqueraded, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(node.pod_gets(&answer, 0, ELSEWHERE)),
            DropReason::DefaultDeny,
            "the pod asked, but may not: nobody may answer"
        );
        node.allow_out(End::World, TCP, 443);
        assert_eq!(
            mark(node.leaves(&masqueraded, POD_MARK, ELSEWHERE)),
            Ok(POD_JUDGED)
        );
        assert!(node.pod_gets(&answer, 0, ELSEWHERE).is_ok());
        let more = family.packet(End::World, End::Pod, TCP, &tcp(443, 4000, ACK));
        assert!(node.pod_gets(&more, 0, ELSEWHERE).is_ok());
        let other = family.packet(End::World, End::Pod, TCP, &tcp(444, 4000, ACK));
        assert_eq!(
            dropped(node.pod_gets(&other, 0, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        node.forbid();
        assert_eq!(
            dropped(node.pod_gets(&more, 0, ELSEWHERE)),
            DropReason::DefaultDeny
        );
    }
}

#[test]
fn the_world_without_masquerade() {
    for family in FAMILIES {
        let node = Node::closed();
        let call = family.packet(End::Pod, End::World, UDP, &udp(4000, 53));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
        assert_eq!(
            dropped(node.leaves(&call, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        node.allow_out(End::World, UDP, 53);
        for _ in 0..2 {
            assert_eq!(
                mark(node.pod_sends(&call)),
                Ok(POD_MARK),
                "judged where it leaves, always"
            );
            assert_eq!(mark(node.leaves(&call, POD_MARK, ELSEWHERE)), Ok(POD_JUDGED));
        }
        assert_eq!(node.world.flows().len(), 1, "one entry");
        let answer = family.packet(End::World, End::Pod, UDP, &udp(53, 4000));
        assert!(node.pod_gets(&answer, 0, ELSEWHERE).is_ok());
    }
}

#[test]
fn translated_addresses_beside_services() {
    for family in FAMILIES {
        // A load balancer's address, and a NodePort of this node.
        for (to, port) in [(End::World, 80), (End::Host, 30_080)] {
            let node = Node::closed();
            let call = family.packet(End::Pod, to, TCP, &tcp(4000, port, SYN));
            assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
            let answer = family.packet(to, End::Pod, TCP, &tcp(port, 4000, SYN | ACK));
            assert_eq!(
                dropped(node.pod_gets(&answer, 0, ELSEWHERE)),
                DropReason::DefaultDeny,
                "{to:?}: came in with that address"
            );
            assert!(
                node.pod_gets(&answer, TUNNEL_MARK, TUNNEL0).is_ok(),
                "{to:?}: only the stack put it there"
            );
            assert!(node.pod_gets(&answer, PEER_JUDGED, ELSEWHERE).is_ok());
        }
        let node = Node::closed();
        for port in [30_080, 8080] {
            let call = family.packet(End::Pod, End::Host, TCP, &tcp(4000, port, SYN));
            assert!(node.pod_sends(&call).is_ok());
            let answer = family.packet(End::Host, End::Pod, TCP, &tcp(port, 4000, SYN | ACK));
            assert_eq!(
                node.pod_gets(&answer, 0, 0).is_ok(),
                port == 30_080,
                "a NodePort that the host serves"
            );
        }
    }
}

#[test]
fn another_node_may_be_a_services_address() {
    for family in FAMILIES {
        let node = Node::closed();
        let call = family.packet(End::Pod, End::OtherNode, TCP, &tcp(4000, 80, SYN));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
        assert_eq!(
            dropped(node.leaves_by_tunnel(&call, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        let answer = family.packet(End::OtherNode, End::Pod, TCP, &tcp(80, 4000, SYN | ACK));
        assert_eq!(dropped(node.pod_gets_remote(&answer)), DropReason::DefaultDeny);
        node.allow_out(End::OtherNode, TCP, 80);
        assert!(node.leaves_by_tunnel(&call, POD_MARK, ELSEWHERE).is_ok());
        assert!(node.pod_gets_remote(&answer).is_ok());
    }
}

#[test]
fn marks_of_nobody_are_refused() {
    let node = Node::closed();
    let packet = Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(4000, 80, SYN));
    assert_eq!(
        dropped(node.leaves_by_tunnel(&packet, 0x77, ELSEWHERE)),
        DropReason::UnknownEndpoint
    );
    let packet = Family::V4.packet(End::Service, End::World, TCP, &tcp(4000, 80, SYN));
    assert_eq!(dropped(node.comes(&packet)), DropReason::ServiceAddress);
}
