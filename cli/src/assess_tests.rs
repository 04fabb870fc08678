//! Every way in which a cluster can be wrong has its sentence.

use super::*;

const NOW: i64 = 1_800_000_000_000;

fn key(node: &str) -> String {
    format!("key-of-{node}")
}

fn peer(own: &str, node: &str, seconds: i64) -> PeerReport {
    PeerReport {
        node: node.into(),
        own_public_key: key(own),
        public_key: key(node),
        last_handshake_unix_ms: NOW - seconds * 1000,
        ready: seconds <= 180,
        ..PeerReport::default()
    }
}

fn node(name: &str, others: &[&str]) -> NodeStatus {
    let slot = Slot {
        slot: 0,
        generation: 1,
        public_key: key(name),
        ..Slot::default()
    };
    NodeStatus {
        name: name.into(),
        slots: vec![slot.clone()],
        datapath: "kernel".into(),
        connected: true,
        last_seen_unix_ms: NOW,
        agent: Some(AgentReport {
            encryption: true,
            slots: vec![slot],
            peers: others.iter().map(|other| peer(name, other, 20)).collect(),
            drops: [("barrier".to_owned(), 2)].into(),
            exemptions: vec!["host to keyd:4250/tcp".into()],
            endpoints: 3,
            ..AgentReport::default()
        }),
        ..NodeStatus::default()
    }
}

/// Three nodes, all well.
fn cluster() -> ClusterStatus {
    ClusterStatus {
        leader: true,
        encryption: true,
        nodes: vec![
            node("a", &["b", "c"]),
            node("b", &["a", "c"]),
            node("c", &["a", "b"]),
        ],
        ..ClusterStatus::default()
    }
}

fn problems(change: impl FnOnce(&mut ClusterStatus)) -> Vec<String> {
    let mut status = cluster();
    change(&mut status);
    let assessment = assess(&status, Vec::new(), NOW);
    assert_eq!(assessment.healthy, assessment.problems.is_empty());
    assessment.problems
}

fn report(status: &mut ClusterStatus, index: usize) -> &mut AgentReport {
    status.nodes[index].agent.as_mut().expect("reported")
}

#[test]
fn all_is_well() {
    let mut status = cluster();
    report(&mut status, 2).peers[0].last_handshake_unix_ms = NOW - 100_000;
    let found = assess(&status, Vec::new(), NOW);
    assert!(found.healthy, "{:?}", found.problems);
    assert_eq!(
        (found.encrypted_nodes, found.nodes.len(), found.pairs.len()),
        (3, 3, 3)
    );
    assert!(found.pairs.iter().all(|pair| pair.encrypted));
    assert_eq!(found.oldest_handshake_seconds, Some(100));
    assert_eq!(found.exemptions, [("host to keyd:4250/tcp".to_owned(), 3)].into());
    assert_eq!(found.drops, [("barrier".to_owned(), 6)].into());
    assert_eq!(
        (
            found.nodes[0].encrypted_peers,
            found.nodes[0].peers,
            found.nodes[0].pods
        ),
        (2, 2, 3)
    );
}

#[test]
fn a_single_node_needs_no_pair() {
    let status = ClusterStatus {
        nodes: vec![node("a", &[])],
        ..cluster()
    };
    let found = assess(&status, Vec::new(), NOW);
    assert!(
        found.healthy && found.encrypted_nodes == 1,
        "{:?}",
        found.problems
    );
}

#[test]
fn the_clusters_own_problems() {
    assert_eq!(
        problems(|status| status.encryption = false),
        ["encryption is off in the cluster's configuration: traffic between nodes is in clear"]
    );
    assert_eq!(
        problems(|status| *status = ClusterStatus {
            encryption: true,
            leader_address: "10.0.0.1:4250".into(),
            ..ClusterStatus::default()
        }),
        ["this keyd does not lead and knows no node's state: the leader is at 10.0.0.1:4250"]
    );
    assert_eq!(
        problems(|status| status.nodes.clear()),
        ["keyd knows no node: no agent has joined yet, or keyd sees no Node objects"]
    );
    assert_eq!(
        problems(|status| status.problems = vec!["node d: podCIDR overlaps that of node a".into()]),
        ["keyd: node d: podCIDR overlaps that of node a"]
    );
}

#[test]
fn an_agent_that_is_away() {
    let found = problems(|status| {
        status.nodes[1].connected = false;
        status.nodes[1].last_seen_unix_ms = NOW - 200_000;
    });
    assert_eq!(
        found,
        ["node b: its agent is not connected to keyd, last seen 3 min 20 s ago"]
    );
    let found = problems(|status| {
        status.nodes[1] = NodeStatus {
            name: "b".into(),
            ..NodeStatus::default()
        };
        status.nodes[0] = node("a", &["c"]);
        status.nodes[2] = node("c", &["a"]);
    });
    assert_eq!(
        found,
        [
            "node b: its agent has never connected to keyd: is it running?",
            "node b: it has no accepted key: nothing can be sent to it encrypted",
        ]
    );
    let found = problems(|status| status.nodes[1].agent = None);
    assert_eq!(found, ["node b: its agent has not reported yet"]);
}

#[test]
fn an_agent_that_complains() {
    let found = problems(|status| {
        report(status, 0).encryption = false;
        report(status, 0).problems = vec!["the device warren0 is gone".into()];
    });
    assert_eq!(found, ["node a: the device warren0 is gone"]);
    let found = problems(|status| report(status, 0).encryption = false);
    assert_eq!(
        found,
        ["node a: its agent reports that encryption is not in effect"]
    );
}

#[test]
fn keys_that_differ() {
    let found = problems(|status| {
        status.nodes[0].slots[0].public_key = "another-key-that-is-long".into();
    });
    assert_eq!(
        found,
        [
            "node a: slot 0 has the key key-of-a but the directory says another-key-...",
            "node b: it still has a peer with the key key-of-a, which belongs to no node",
            "node c: it still has a peer with the key key-of-a, which belongs to no node",
            "a and b: the two ends do not agree on each other's current keys",
            "a and c: the two ends do not agree on each other's current keys",
        ]
    );
    let found = problems(|status| report(status, 0).slots.clear());
    assert_eq!(
        found,
        ["node a: key generation 1 is published but on no device of the node"]
    );
}

#[test]
fn a_second_slot_that_no_pair_needs_is_no_problem() {
    let found = problems(|status| {
        let slot = Slot {
            slot: 1,
            ..status.nodes[0].slots[0].clone()
        };
        status.nodes[0].slots.push(slot);
    });
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn a_report_of_before_the_keys_changed_accuses_nobody() {
    let change = |applied: u64| {
        problems(|status| {
            status.nodes[0].slots[0].public_key = "new-key-of-a".into();
            for index in 0..3 {
                (report(status, index).epoch, report(status, index).version) = (1, 1);
                (
                    status.nodes[index].applied_epoch,
                    status.nodes[index].applied_version,
                ) = (1, applied);
            }
        })
    };
    assert_eq!(change(2), Vec::<String>::new());
    assert_eq!(change(1).len(), 5);
}

#[test]
fn the_key_that_counts_is_the_active_one() {
    let mut status = cluster();
    status.nodes[0].active = 1;
    status.nodes[0].slots.push(Slot {
        slot: 2,
        generation: 2,
        public_key: "new-key-of-a".into(),
        ..Slot::default()
    });
    let found = assess(&status, Vec::new(), NOW);
    assert_eq!(
        (found.nodes[0].generation, found.nodes[0].public_key.as_str()),
        (1, "key-of-a")
    );
    assert!(found.healthy, "{:?}", found.problems);
}

#[test]
fn a_missing_peer() {
    let found = problems(|status| {
        report(status, 0).peers.remove(0);
    });
    assert_eq!(found, ["a and b: a has no peer for b"]);
}

#[test]
fn an_old_handshake() {
    let mut status = cluster();
    report(&mut status, 0).peers[0] = peer("a", "b", 400);
    report(&mut status, 1).peers[0] = PeerReport {
        last_handshake_unix_ms: 0,
        ..peer("b", "a", 400)
    };
    let found = assess(&status, Vec::new(), NOW);
    assert_eq!(
        found.problems,
        [
            "a and b: a has no fresh handshake with b (last: 6 min 40 s ago): is UDP between them open?",
            "a and b: b has no fresh handshake with a (last: never): is UDP between them open?",
        ]
    );
    assert_eq!((found.encrypted_nodes, found.oldest_handshake_seconds), (1, None));
    assert!(!found.nodes[0].encrypted && found.nodes[2].encrypted);
}

#[test]
fn a_rotation_has_two_paths_and_the_better_one_counts() {
    let found = problems(|status| {
        for (index, own, other) in [(0, "a", "b"), (1, "b", "a")] {
            let new = |node: &str| format!("new-key-of-{node}");
            let slot = Slot {
                slot: 1,
                generation: 2,
                public_key: new(own),
                ..Slot::default()
            };
            status.nodes[index].slots.push(slot.clone());
            report(status, index).slots.push(slot);
            let fresh = PeerReport {
                own_public_key: new(own),
                public_key: new(other),
                last_handshake_unix_ms: 0,
                ready: false,
                ..peer(own, other, 0)
            };
            report(status, index).peers.push(fresh);
        }
    });
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn spans() {
    let texts = [0, 59, 60, 200, 3600, 7500, 86_400, 270_000].map(span);
    assert_eq!(
        texts,
        [
            "0 s",
            "59 s",
            "1 min",
            "3 min 20 s",
            "1 h",
            "2 h 5 min",
            "1 d",
            "3 d 3 h"
        ]
    );
}
