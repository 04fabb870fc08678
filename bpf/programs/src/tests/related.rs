//! ICMP errors: they pass where the packet that they quote belongs to a flow that policy allows.

use warren_abi::DropReason;

use super::packets::*;
use crate::testing::{POD_MARK, TUNNEL_MARK, TUNNEL0};

/// A node whose pod has called the remote pod.
fn called(family: Family) -> (Node, Vec<u8>) {
    let node = Node::closed();
    node.allow_out(End::Remote, UDP, 53);
    let call = family.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    assert!(node.pod_sends(&call).is_ok());
    (node, call)
}

#[test]
fn errors_about_an_allowed_flow_pass() {
    for family in FAMILIES {
        let (node, call) = called(family);
        for from in [End::Remote, End::OtherNode] {
            let error = family.error(from, End::Pod, &call, 1_000);
            assert!(node.pod_gets_remote(&error).is_ok(), "{from:?}");
        }
        let shortest = call.len() - 4;
        let error = family.error(End::Remote, End::Pod, &call, shortest);
        assert!(
            node.pod_gets_remote(&error).is_ok(),
            "eight bytes less four: the ports are there"
        );
        let before = node.world.flows();
        assert_eq!(before.len(), 1);
        assert!(node.world.established.borrow().is_empty(), "an error is no reply");
    }
}

#[test]
fn forged_quotes_are_judged_by_policy() {
    for family in FAMILIES {
        let (node, call) = called(family);
        let quotes = [
            (
                "never sent",
                family.packet(End::Pod, End::Remote, UDP, &udp(4001, 53)),
            ),
            (
                "another peer",
                family.packet(End::Pod, End::World, UDP, &udp(4000, 53)),
            ),
            (
                "another protocol",
                family.packet(End::Pod, End::Remote, TCP, &tcp(4000, 53, SYN)),
            ),
            (
                "of somebody else",
                family.packet(End::Peer, End::Remote, UDP, &udp(4000, 53)),
            ),
            (
                "the reply",
                family.packet(End::Remote, End::Pod, UDP, &udp(53, 4000)),
            ),
        ];
        for (name, quoted) in quotes {
            let error = family.error(End::Remote, End::Pod, &quoted, 1_000);
            assert_eq!(
                dropped(node.pod_gets_remote(&error)),
                DropReason::DefaultDeny,
                "{name}"
            );
        }
        for length in 0..call.len() - 4 {
            let error = family.error(End::Remote, End::Pod, &call, length);
            assert_eq!(
                dropped(node.pod_gets_remote(&error)),
                DropReason::DefaultDeny,
                "cut off at {length}"
            );
        }
        let mut version = call.clone();
        version[0] ^= 0x20;
        let error = family.error(End::Remote, End::Pod, &version, 1_000);
        assert_eq!(
            dropped(node.pod_gets_remote(&error)),
            DropReason::DefaultDeny,
            "another version"
        );
        let (protocol, _, _, kind) = family.icmp();
        node.allow_in(End::Remote, protocol, kind.into());
        let error = family.error(End::Remote, End::Pod, &version, 1_000);
        assert!(node.pod_gets_remote(&error).is_ok(), "policy may allow the type");
    }
}

#[test]
fn a_quoted_later_fragment_says_nothing() {
    let (node, mut call) = called(Family::V4);
    call[7] = 1;
    let error = Family::V4.error(End::Remote, End::Pod, &call, 1_000);
    assert_eq!(dropped(node.pod_gets_remote(&error)), DropReason::DefaultDeny);
}

#[test]
fn redirects_are_no_errors() {
    let (node, call) = called(Family::V4);
    let redirect = Family::V4.packet(
        End::Remote,
        End::Pod,
        1,
        &[&[5, 1, 0, 0, 0, 0, 0, 0], &call[..]].concat(),
    );
    assert_eq!(dropped(node.pod_gets_remote(&redirect)), DropReason::DefaultDeny);
}

#[test]
fn a_pod_reports_errors_about_what_it_got() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Remote, UDP, 53);
        let call = family.packet(End::Remote, End::Pod, UDP, &udp(4000, 53));
        assert!(node.pod_gets_remote(&call).is_ok());
        let error = family.error(End::Pod, End::Remote, &call, 1_000);
        assert_eq!(mark(node.pod_sends(&error)), Ok(POD_JUDGED));
        let elsewhere = family.error(End::Pod, End::Peer, &call, 1_000);
        assert_eq!(
            dropped(node.pod_sends(&elsewhere)),
            DropReason::DefaultDeny,
            "not to who sent it"
        );
        let other = family.packet(End::Remote, End::Pod, UDP, &udp(4000, 54));
        let error = family.error(End::Pod, End::Remote, &other, 1_000);
        assert_eq!(dropped(node.pod_sends(&error)), DropReason::DefaultDeny);
    }
}

#[test]
fn errors_follow_policy() {
    for family in FAMILIES {
        let (mut node, call) = called(family);
        let error = family.error(End::Remote, End::Pod, &call, 1_000);
        node.world.state.revision += 1;
        assert!(node.pod_gets_remote(&error).is_ok(), "judged again");
        node.forbid();
        assert_eq!(dropped(node.pod_gets_remote(&error)), DropReason::DefaultDeny);
    }
}

#[test]
fn errors_about_echoes_and_translated_flows() {
    for family in FAMILIES {
        let node = Node::closed();
        let (protocol, request, _, _) = family.icmp();
        node.allow_out(End::Remote, protocol, request.into());
        let echo = family.echo(End::Pod, End::Remote, 7, false);
        assert!(node.pod_sends(&echo).is_ok());
        assert!(
            node.pod_gets_remote(&family.error(End::Remote, End::Pod, &echo, 1_000))
                .is_ok()
        );
        let other = family.echo(End::Pod, End::Remote, 8, false);
        let error = family.error(End::Remote, End::Pod, &other, 1_000);
        assert_eq!(dropped(node.pod_gets_remote(&error)), DropReason::DefaultDeny);
        // Of a service: the stack translates what is quoted as well.
        let call = family.packet(End::Pod, End::Service, UDP, &udp(4000, 53));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
        assert!(
            node.pod_gets(
                &family.error(End::Remote, End::Pod, &call, 1_000),
                TUNNEL_MARK,
                TUNNEL0
            )
            .is_ok()
        );
        // To the world, where the pod may not go: the mark of the error says nothing about what it quotes.
        let call = family.packet(End::Pod, End::World, UDP, &udp(4000, 53));
        assert_eq!(mark(node.pod_sends(&call)), Ok(POD_MARK));
        let error = family.error(End::Remote, End::Pod, &call, 1_000);
        assert_eq!(dropped(node.pod_gets_remote(&error)), DropReason::DefaultDeny);
        node.allow_out(End::World, UDP, 53);
        assert!(node.pod_gets_remote(&error).is_ok());
    }
}
