//! The host as an endpoint: its policy, and what is exempt.

use warren_abi::{DropReason, EGRESS, INGRESS, MASQUERADED};

use super::packets::*;
use crate::testing::{PEER_MARK, POD_INDEX, POD_MARK, TUNNEL_MARK, TUNNEL0};

/// A node whose host is default-deny in both directions.
fn closed() -> Node {
    let node = Node::open();
    node.world.close(0);
    node
}

fn allow(node: &Node, direction: u8, peer: End, protocol: u8, port: u16) {
    node.world
        .rule(0, direction, (protocol, port), identity_of(peer), true);
}

#[test]
fn an_open_host_is_not_tracked() {
    for family in FAMILIES {
        let node = Node::open();
        let syn = tcp(4000, 80, SYN);
        assert_eq!(
            mark(node.leaves(&family.packet(End::Host, End::World, TCP, &syn), 0, 0)),
            Ok(0)
        );
        assert!(
            node.leaves_by_tunnel(&family.packet(End::Host, End::Remote, TCP, &syn), 0, 0)
                .is_ok()
        );
        assert!(
            node.socket_gets(&family.packet(End::World, End::Host, TCP, &syn), 0, ELSEWHERE)
                .is_ok()
        );
        assert!(node.comes(&family.echo(End::World, End::Host, 1, false)).is_ok());
        assert!(node.world.flows().is_empty());
    }
}

#[test]
fn host_policy_of_sockets() {
    for family in FAMILIES {
        let node = closed();
        let syn = family.packet(End::World, End::Host, TCP, &tcp(4000, 22, SYN));
        assert_eq!(
            dropped(node.socket_gets(&syn, 0, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        allow(&node, INGRESS, End::World, TCP, 22);
        assert!(node.socket_gets(&syn, 0, ELSEWHERE).is_ok());
        let answer = family.packet(End::Host, End::World, TCP, &tcp(22, 4000, SYN | ACK));
        assert!(node.leaves(&answer, 0, 0).is_ok(), "a reply");
        let call = family.packet(End::Host, End::World, TCP, &tcp(22, 4001, SYN));
        assert_eq!(dropped(node.leaves(&call, 0, 0)), DropReason::DefaultDeny);
        allow(&node, EGRESS, End::Remote, TCP, 80);
        let call = family.packet(End::Host, End::Remote, TCP, &tcp(5000, 80, SYN));
        assert!(node.leaves_by_tunnel(&call, 0, 0).is_ok());
        let answer = family.packet(End::Remote, End::Host, TCP, &tcp(80, 5000, SYN | ACK));
        assert!(node.socket_gets(&answer, TUNNEL_MARK, TUNNEL0).is_ok());
        let stray = family.packet(End::Remote, End::Host, TCP, &tcp(80, 5001, ACK));
        assert_eq!(
            dropped(node.socket_gets(&stray, TUNNEL_MARK, TUNNEL0)),
            DropReason::DefaultDeny
        );
        let loopback = family.packet(End::Host, End::Host, TCP, &tcp(80, 5001, SYN));
        assert!(node.socket_gets(&loopback, 0, 1).is_ok(), "to itself");
    }
}

#[test]
fn sockets_of_pods_are_not_the_hosts() {
    for family in FAMILIES {
        let node = closed();
        let syn = family.packet(End::World, End::Pod, TCP, &tcp(4000, 80, SYN));
        assert!(node.socket_gets(&syn, 0, 7).is_ok(), "judged at its veth");
        assert!(node.world.flows().is_empty());
    }
}

#[test]
fn a_pod_calls_the_host() {
    for family in FAMILIES {
        let node = Node::closed();
        node.world.close(0);
        let syn = family.packet(End::Pod, End::Host, TCP, &tcp(4000, 80, SYN));
        assert_eq!(mark(node.pod_sends(&syn)), Ok(POD_MARK), "it may be a NodePort");
        assert_eq!(
            dropped(node.socket_gets(&syn, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny,
            "egress of the pod"
        );
        node.allow_out(End::Host, TCP, 80);
        assert_eq!(
            dropped(node.socket_gets(&syn, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny,
            "ingress of the host"
        );
        allow(&node, INGRESS, End::Pod, TCP, 80);
        assert!(node.socket_gets(&syn, POD_MARK, ELSEWHERE).is_ok());
        let answer = family.packet(End::Host, End::Pod, TCP, &tcp(80, 4000, SYN | ACK));
        assert!(node.pod_gets(&answer, 0, 0).is_ok());
        // Behind masquerade it is the same pod.
        let masqueraded = family.packet(End::Host, End::Host, TCP, &tcp(4000, 81, SYN));
        assert_eq!(
            dropped(node.socket_gets(&masqueraded, PEER_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
    }
}

#[test]
fn an_address_that_nobody_named_the_hosts() {
    for family in FAMILIES {
        let node = Node::closed();
        let syn = family.packet(End::Pod, End::World, TCP, &tcp(4000, 80, SYN));
        assert_eq!(
            dropped(node.socket_gets(&syn, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        node.allow_out(End::World, TCP, 80);
        assert!(node.socket_gets(&syn, POD_MARK, ELSEWHERE).is_ok());
        assert!(node.world.flows().is_empty());
    }
}

#[test]
fn protocols_without_ports() {
    for family in FAMILIES {
        let (protocol, request, _, _) = family.icmp();
        let node = closed();
        let ping = |from| family.echo(from, End::Host, 7, false);
        assert_eq!(dropped(node.comes(&ping(End::World))), DropReason::DefaultDeny);
        assert_eq!(
            dropped(node.comes_by_tunnel(&ping(End::Remote))),
            DropReason::DefaultDeny
        );
        assert_eq!(dropped(node.pod_sends(&ping(End::Pod))), DropReason::DefaultDeny);
        for end in [End::World, End::Remote, End::Pod] {
            allow(&node, INGRESS, end, protocol, request.into());
        }
        assert!(node.comes(&ping(End::World)).is_ok());
        assert!(node.comes_by_tunnel(&ping(End::Remote)).is_ok());
        assert_eq!(mark(node.pod_sends(&ping(End::Pod))), Ok(POD_JUDGED));
        for (to, leaves) in [(End::World, true), (End::Remote, false)] {
            let answer = family.echo(End::Host, to, 7, true);
            let judged = if leaves {
                node.leaves(&answer, 0, 0)
            } else {
                node.leaves_by_tunnel(&answer, 0, 0)
            };
            assert!(judged.is_ok(), "{to:?}");
        }
        assert!(
            node.pod_gets(&family.echo(End::Host, End::Pod, 7, true), 0, 0)
                .is_ok()
        );
        node.world.close(POD_INDEX);
        let other = family.echo(End::Pod, End::Host, 8, false);
        assert_eq!(
            dropped(node.pod_sends(&other)),
            DropReason::DefaultDeny,
            "the pod's egress"
        );
        let tcp = family.packet(End::World, End::Host, TCP, &tcp(1, 22, SYN));
        assert!(node.comes(&tcp).is_ok(), "judged at its socket");
    }
}

#[test]
fn what_answers_a_masqueraded_pod_passes_the_host() {
    for family in FAMILIES {
        let node = closed();
        let (protocol, ..) = family.icmp();
        let ping = family.echo(End::Host, End::World, 7, false);
        assert_eq!(mark(node.leaves(&ping, POD_MARK, ELSEWHERE)), Ok(POD_JUDGED));
        assert!(node.comes(&family.echo(End::World, End::Host, 7, true)).is_ok());
        assert_eq!(
            dropped(node.comes(&family.echo(End::World, End::Host, 8, true))),
            DropReason::DefaultDeny
        );
        let call = family.packet(End::Host, End::World, TCP, &tcp(50_000, 443, SYN));
        assert_eq!(mark(node.leaves(&call, POD_MARK, ELSEWHERE)), Ok(POD_JUDGED));
        assert!(
            node.comes(&family.error(End::World, End::Host, &call, 1_000))
                .is_ok(),
            "path MTU: {protocol}"
        );
        let other = family.packet(End::Host, End::World, TCP, &tcp(50_001, 443, SYN));
        assert_eq!(
            dropped(node.comes(&family.error(End::World, End::Host, &other, 1_000))),
            DropReason::DefaultDeny
        );
        let answer = family.packet(End::World, End::Host, TCP, &tcp(443, 50_000, SYN | ACK));
        assert_eq!(
            dropped(node.socket_gets(&answer, 0, ELSEWHERE)),
            DropReason::DefaultDeny,
            "it opens no socket of the host"
        );
        assert!(
            !node.world.counts.borrow().contains_key(&0),
            "and costs the host nothing"
        );
        assert!(
            node.world
                .flows()
                .iter()
                .any(|(key, _)| key.endpoint == MASQUERADED)
        );
    }
}

#[test]
fn tunnels_and_discovery_are_exempt() {
    for family in FAMILIES {
        let node = closed();
        for port in [51_871, 51_873] {
            let out = family.packet(End::Host, End::OtherNode, UDP, &udp(port, 51_871));
            assert!(node.leaves(&out, 0, 0).is_ok());
            let enter = family.packet(End::OtherNode, End::Host, UDP, &udp(51_871, port));
            assert!(node.socket_gets(&enter, 0, ELSEWHERE).is_ok());
        }
        for port in [51_870, 51_874] {
            let out = family.packet(End::Host, End::OtherNode, UDP, &udp(port, 51_871));
            assert_eq!(dropped(node.leaves(&out, 0, 0)), DropReason::DefaultDeny);
            let enter = family.packet(End::OtherNode, End::Host, UDP, &udp(51_871, port));
            assert_eq!(
                dropped(node.socket_gets(&enter, 0, ELSEWHERE)),
                DropReason::DefaultDeny
            );
        }
    }
    let node = closed();
    let mut solicitation = Family::V6.packet(
        End::OtherNode,
        End::Host,
        58,
        &[&[135, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat(),
    );
    assert_eq!(
        dropped(node.comes(&solicitation)),
        DropReason::DefaultDeny,
        "crossed a router"
    );
    solicitation[7] = 255;
    assert!(node.comes(&solicitation).is_ok());
}

#[test]
fn answers_from_translated_addresses() {
    for family in FAMILIES {
        let node = closed();
        let answer = |from, port| family.packet(from, End::Host, TCP, &tcp(port, 5000, SYN | ACK));
        assert!(
            node.socket_gets(&answer(End::Service, 80), TUNNEL_MARK, TUNNEL0)
                .is_ok()
        );
        assert!(
            node.socket_gets(&answer(End::World, 80), TUNNEL_MARK, TUNNEL0)
                .is_ok(),
            "a load balancer's"
        );
        assert!(
            node.socket_gets(&answer(End::Host, 30_080), POD_JUDGED, ELSEWHERE)
                .is_ok(),
            "its own NodePort"
        );
        assert_eq!(
            dropped(node.socket_gets(&answer(End::World, 80), 0, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(node.socket_gets(&answer(End::Host, 30_080), TUNNEL_MARK, TUNNEL0)),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(node.socket_gets(&answer(End::Pod, 80), POD_JUDGED, ELSEWHERE)),
            DropReason::DefaultDeny
        );
    }
}
