//! Flows of a pod, seen at its veth.

use warren_abi::{DropReason, FLOW_AUDIT, FLOW_EGRESS, FLOW_JUDGED, FLOW_REPLY, POLICY_AUDIT};

use super::packets::*;
use crate::testing::{POD_INDEX, POD_MARK};

#[test]
fn a_closed_pod_gets_and_sends_nothing() {
    for family in FAMILIES {
        let node = Node::closed();
        for (protocol, payload) in [
            (TCP, tcp(4000, 80, SYN)),
            (UDP, udp(4000, 80)),
            (SCTP, sctp(4000, 80, 1)),
            (47, vec![0; 8]),
        ] {
            let out = family.packet(End::Pod, End::Remote, protocol, &payload);
            assert_eq!(
                dropped(node.pod_sends(&out)),
                DropReason::DefaultDeny,
                "{protocol}"
            );
            let enter = family.packet(End::Remote, End::Pod, protocol, &payload);
            assert_eq!(
                dropped(node.pod_gets_remote(&enter)),
                DropReason::DefaultDeny,
                "{protocol}"
            );
        }
        assert_eq!(
            dropped(node.pod_sends(&family.echo(End::Pod, End::Remote, 7, false))),
            DropReason::DefaultDeny
        );
        assert!(node.world.flows().is_empty(), "what is denied leaves no trace");
        node.world.policies.borrow_mut().remove(&POD_INDEX);
        let packet = family.packet(End::Remote, End::Pod, UDP, &udp(1, 2));
        assert_eq!(
            dropped(node.pod_gets_remote(&packet)),
            DropReason::NoPolicy,
            "not compiled yet"
        );
    }
}

#[test]
fn replies_pass_and_nothing_else() {
    for family in FAMILIES {
        for (protocol, first, answer) in [
            (TCP, tcp(4000, 80, SYN), tcp(80, 4000, SYN | ACK)),
            (UDP, udp(4000, 80), udp(80, 4000)),
            (SCTP, sctp(4000, 80, 1), sctp(80, 4000, 2)),
        ] {
            let node = Node::closed();
            node.allow_out(End::Remote, protocol, 80);
            let out = family.packet(End::Pod, End::Remote, protocol, &first);
            assert_eq!(mark(node.pod_sends(&out)), Ok(POD_JUDGED), "{protocol}");
            let back = family.packet(End::Remote, End::Pod, protocol, &answer);
            assert!(node.pod_gets_remote(&back).is_ok(), "{protocol}");
            assert!(node.pod_gets_remote(&back).is_ok(), "{protocol}: again");
            let other = match protocol {
                TCP => tcp(80, 4001, SYN | ACK),
                UDP => udp(80, 4001),
                _ => sctp(80, 4001, 2),
            };
            let other = family.packet(End::Remote, End::Pod, protocol, &other);
            assert_eq!(
                dropped(node.pod_gets_remote(&other)),
                DropReason::DefaultDeny,
                "another port"
            );
            let other = family.packet(End::OtherNode, End::Pod, protocol, &answer);
            assert_eq!(
                dropped(node.pod_gets_remote(&other)),
                DropReason::DefaultDeny,
                "another sender"
            );
            assert_eq!(node.world.flows().len(), 1);
            assert_eq!(
                node.world.established.borrow().len(),
                1,
                "a reply makes it safe from eviction"
            );
        }
    }
}

#[test]
fn a_pod_answers_whom_it_may_not_call() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Remote, TCP, 80);
        let syn = family.packet(End::Remote, End::Pod, TCP, &tcp(4000, 80, SYN));
        assert!(node.pod_gets_remote(&syn).is_ok());
        let answer = family.packet(End::Pod, End::Remote, TCP, &tcp(80, 4000, SYN | ACK));
        assert_eq!(mark(node.pod_sends(&answer)), Ok(POD_JUDGED));
        let (_, value) = node.world.flows()[0];
        assert_eq!(value.flags, FLOW_JUDGED | FLOW_REPLY);
        let call = family.packet(End::Pod, End::Remote, TCP, &tcp(80, 4000, SYN));
        assert_eq!(
            dropped(node.pod_sends(&call)),
            DropReason::DefaultDeny,
            "a SYN the other way is a new flow"
        );
        assert!(
            node.pod_sends(&answer).is_ok(),
            "and hurts the old one in nothing"
        );
    }
}

#[test]
fn connections_open_with_a_syn_only() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_out(End::Remote, TCP, 80);
        let back = family.packet(End::Remote, End::Pod, TCP, &tcp(80, 4000, ACK));
        for flags in [ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | FIN, 0, 0xff] {
            let packet = family.packet(End::Pod, End::Remote, TCP, &tcp(4000, 80, flags));
            assert!(node.pod_sends(&packet).is_ok(), "{flags:#x}: policy allows it");
            assert!(node.world.flows().is_empty(), "{flags:#x}");
            assert_eq!(
                dropped(node.pod_gets_remote(&back)),
                DropReason::DefaultDeny,
                "{flags:#x}"
            );
        }
        let packet = family.packet(End::Pod, End::Remote, SCTP, &sctp(4000, 80, 0));
        assert_eq!(dropped(node.pod_sends(&packet)), DropReason::DefaultDeny);
    }
}

#[test]
fn flows_in_progress_are_adopted_for_a_while() {
    let mut node = Node::closed();
    node.allow_out(End::Remote, TCP, 80);
    node.world.state.adopt_until = 1_010;
    let packet = Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(4000, 80, ACK));
    let back = Family::V4.packet(End::Remote, End::Pod, TCP, &tcp(80, 4000, ACK));
    assert!(node.pod_sends(&packet).is_ok());
    assert!(node.pod_gets_remote(&back).is_ok());
    for flags in [RST, SYN | ACK] {
        let packet = Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(4001, 80, flags));
        assert!(node.pod_sends(&packet).is_ok());
        assert_eq!(node.world.flows().len(), 1, "{flags}: never");
    }
    node.wait(10);
    let packet = Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(4002, 80, ACK));
    assert!(node.pod_sends(&packet).is_ok());
    assert_eq!(node.world.flows().len(), 1, "over");
}

#[test]
fn a_change_of_policy_reaches_flows_whichever_way_the_next_packet_goes() {
    for family in FAMILIES {
        for pod_first in [false, true] {
            let mut node = Node::closed();
            node.allow_in(End::Remote, TCP, 80);
            let from = |flags| family.packet(End::Remote, End::Pod, TCP, &tcp(4000, 80, flags));
            let to = |flags| family.packet(End::Pod, End::Remote, TCP, &tcp(80, 4000, flags));
            assert!(node.pod_gets_remote(&from(SYN)).is_ok());
            assert!(node.pod_sends(&to(SYN | ACK)).is_ok());
            node.world.state.revision += 1;
            assert!(node.pod_sends(&to(ACK)).is_ok(), "still allowed");
            node.forbid();
            // The pod may call out itself now: that must not revive what came in.
            node.allow_out(End::Remote, TCP, 4000);
            if pod_first {
                assert_eq!(dropped(node.pod_sends(&to(ACK))), DropReason::DefaultDeny);
            }
            assert_eq!(dropped(node.pod_gets_remote(&from(ACK))), DropReason::DefaultDeny);
            assert_eq!(dropped(node.pod_sends(&to(ACK))), DropReason::DefaultDeny);
            node.allow_in(End::Remote, TCP, 80);
            node.world.state.revision += 1;
            assert!(node.pod_sends(&to(ACK)).is_ok(), "allowed again");
            assert!(node.pod_gets_remote(&from(ACK)).is_ok());
        }
    }
}

#[test]
fn a_closed_connection_begins_anew() {
    let mut node = Node::closed();
    node.allow_in(End::Remote, TCP, 80);
    let from = |flags| Family::V4.packet(End::Remote, End::Pod, TCP, &tcp(4000, 80, flags));
    let to = |flags| Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(80, 4000, flags));
    for packet in [from(SYN), from(ACK), from(FIN | ACK)] {
        assert!(node.pod_gets_remote(&packet).is_ok());
    }
    assert!(node.pod_sends(&to(FIN | ACK)).is_ok());
    assert!(node.pod_gets_remote(&from(ACK)).is_ok(), "the last ACK");
    let lifetime = node.world.flows()[0].1.lifetime;
    assert!(lifetime <= 60, "{lifetime}");
    // A SYN is judged by itself, whatever the revision says.
    node.world.verdicts.borrow_mut().clear();
    assert_eq!(dropped(node.pod_gets_remote(&from(SYN))), DropReason::DefaultDeny);
    assert!(
        node.pod_gets_remote(&from(ACK)).is_ok(),
        "what is denied changes nothing"
    );
    node.forbid();
    assert_eq!(dropped(node.pod_gets_remote(&from(ACK))), DropReason::DefaultDeny);
}

#[test]
fn resets() {
    let node = Node::closed();
    node.allow_in(End::Remote, TCP, 80);
    let from = |flags| Family::V4.packet(End::Remote, End::Pod, TCP, &tcp(4000, 80, flags));
    let to = |flags| Family::V4.packet(End::Pod, End::Remote, TCP, &tcp(80, 4000, flags));
    assert!(node.pod_gets_remote(&from(SYN)).is_ok());
    assert!(node.pod_sends(&to(RST | ACK)).is_ok(), "refused");
    assert_eq!(node.world.established.borrow().len(), 0, "a scan fills no map");
    assert_eq!(node.world.flows()[0].1.lifetime, 10);
    assert!(node.pod_gets_remote(&from(SYN)).is_ok());
    assert!(node.pod_sends(&to(SYN | ACK)).is_ok());
    assert!(node.pod_gets_remote(&from(RST)).is_ok());
    assert_eq!(node.world.flows()[0].1.lifetime, 10);
    assert!(
        node.pod_sends(&to(ACK)).is_ok(),
        "a blind reset that the pod did not believe"
    );
    assert!(node.world.flows()[0].1.lifetime > 3600);
    let stray = Family::V4.packet(End::Remote, End::Pod, TCP, &tcp(4001, 81, RST));
    assert_eq!(dropped(node.pod_gets_remote(&stray)), DropReason::DefaultDeny);
}

#[test]
fn flows_end_by_themselves() {
    let node = Node::closed();
    node.allow_out(End::Remote, UDP, 53);
    let out = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    let back = Family::V4.packet(End::Remote, End::Pod, UDP, &udp(53, 4000));
    assert!(node.pod_sends(&out).is_ok());
    node.wait(31);
    assert_eq!(dropped(node.pod_gets_remote(&back)), DropReason::DefaultDeny);
    assert!(node.pod_sends(&out).is_ok());
    node.wait(30);
    assert!(node.pod_gets_remote(&back).is_ok());
    node.wait(180);
    assert!(
        node.pod_gets_remote(&back).is_ok(),
        "it lives longer once it was answered"
    );
    node.wait(181);
    assert_eq!(dropped(node.pod_gets_remote(&back)), DropReason::DefaultDeny);
    assert_eq!(
        node.world.counts.borrow()[&POD_INDEX],
        1,
        "the same entry all the time"
    );
}

#[test]
fn echoes_are_answered_by_who_was_asked() {
    for family in FAMILIES {
        let (protocol, request, _, _) = family.icmp();
        let node = Node::closed();
        node.allow_out(End::Remote, protocol, request.into());
        assert!(
            node.pod_sends(&family.echo(End::Pod, End::Remote, 7, false))
                .is_ok()
        );
        assert!(
            node.pod_gets_remote(&family.echo(End::Remote, End::Pod, 7, true))
                .is_ok()
        );
        assert_eq!(
            dropped(node.pod_gets_remote(&family.echo(End::Remote, End::Pod, 8, true))),
            DropReason::DefaultDeny
        );
        assert_eq!(
            dropped(node.pod_gets_remote(&family.echo(End::Remote, End::Pod, 7, false))),
            DropReason::DefaultDeny,
            "a request with the same identifier is no reply"
        );
    }
}

#[test]
fn audit_reports_and_lets_pass() {
    for family in FAMILIES {
        let mut node = Node::closed();
        node.world
            .policies
            .borrow_mut()
            .get_mut(&POD_INDEX)
            .unwrap()
            .flags = POLICY_AUDIT;
        let out = family.packet(End::Pod, End::Remote, TCP, &tcp(4000, 80, SYN));
        let back = family.packet(End::Remote, End::Pod, TCP, &tcp(80, 4000, SYN | ACK));
        assert_eq!(mark(node.pod_sends(&out)), Ok(POD_JUDGED));
        assert!(node.pod_gets_remote(&back).is_ok());
        let (_, value) = node.world.flows()[0];
        assert_eq!(value.flags, FLOW_EGRESS | FLOW_JUDGED | FLOW_AUDIT | FLOW_REPLY);
        let told: Vec<_> = node
            .world
            .events
            .borrow()
            .iter()
            .map(|event| (event.outcome, event.reason))
            .collect();
        assert_eq!(told, [(3, DropReason::DefaultDeny as u8)]);
        node.world
            .policies
            .borrow_mut()
            .get_mut(&POD_INDEX)
            .unwrap()
            .flags = 0;
        node.world.state.revision += 1;
        assert_eq!(
            dropped(node.pod_gets_remote(&back)),
            DropReason::DefaultDeny,
            "audit is over"
        );
    }
}

#[test]
fn an_endpoint_has_a_limit_while_somebody_collects() {
    let mut node = Node::closed();
    node.world.open(POD_INDEX);
    node.world.state.limit = 3;
    node.world.state.collected = 900;
    let out = |port| Family::V4.packet(End::Pod, End::Remote, UDP, &udp(port, 53));
    for port in 1..=3 {
        assert!(node.pod_sends(&out(port)).is_ok());
    }
    assert_eq!(dropped(node.pod_sends(&out(4))), DropReason::FlowLimit);
    assert!(node.pod_sends(&out(1)).is_ok(), "those that are there live on");
    let other = Family::V4.packet(End::Peer, End::Remote, UDP, &udp(4, 53));
    assert!(node.peer_sends(&other).is_ok(), "other pods notice nothing");
    let note = Family::V4.packet(End::Pod, End::World, UDP, &udp(4, 53));
    assert_eq!(
        dropped(node.pod_sends(&note)),
        DropReason::FlowLimit,
        "noted flows count"
    );
    node.wait(21);
    assert!(node.pod_sends(&out(4)).is_ok(), "the agent is gone");
}

#[test]
fn a_full_map_opens_nothing() {
    let mut node = Node::closed();
    node.allow_out(End::Remote, UDP, 53);
    node.world.room = Some(0);
    let out = Family::V4.packet(End::Pod, End::Remote, UDP, &udp(4000, 53));
    let back = Family::V4.packet(End::Remote, End::Pod, UDP, &udp(53, 4000));
    assert!(node.pod_sends(&out).is_ok());
    assert!(
        node.pod_gets_remote(&back).is_ok(),
        "it stays where it may be evicted"
    );
    assert_eq!(node.world.new.borrow().len(), 1);
    node.world.room = None;
    node.wait(1);
    assert!(node.pod_gets_remote(&back).is_ok());
    assert_eq!(
        (
            node.world.new.borrow().len(),
            node.world.established.borrow().len()
        ),
        (0, 1)
    );
    node.world.established.borrow_mut().clear();
    assert_eq!(
        dropped(node.pod_gets_remote(&back)),
        DropReason::DefaultDeny,
        "evicted"
    );
}

#[test]
fn both_ends_of_a_node_are_judged() {
    for family in FAMILIES {
        let node = Node::closed();
        node.allow_in(End::Peer, TCP, 80);
        let syn = family.packet(End::Peer, End::Pod, TCP, &tcp(4000, 80, SYN));
        assert_eq!(mark(node.peer_sends(&syn)), Ok(PEER_JUDGED));
        assert!(node.pod_gets(&syn, PEER_JUDGED, ELSEWHERE).is_ok());
        let other = family.packet(End::Peer, End::Pod, TCP, &tcp(4000, 81, SYN));
        assert_eq!(
            dropped(node.pod_gets(&other, PEER_JUDGED, ELSEWHERE)),
            DropReason::DefaultDeny
        );
        let answer = family.packet(End::Pod, End::Peer, TCP, &tcp(80, 4000, SYN | ACK));
        assert_eq!(mark(node.pod_sends(&answer)), Ok(POD_JUDGED));
        assert!(node.peer_gets(&answer, POD_JUDGED, ELSEWHERE).is_ok());
        let call = family.packet(End::Pod, End::Peer, TCP, &tcp(4000, 80, SYN));
        assert_eq!(
            dropped(node.peer_gets(&call, POD_MARK, ELSEWHERE)),
            DropReason::DefaultDeny,
            "the sender's egress where nobody judged it before"
        );
    }
}
