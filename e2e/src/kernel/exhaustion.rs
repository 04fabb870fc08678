//! What happens where something is full: what is there lives on, what is new is denied and reported, others notice nothing.
//! Needs root, and fails without.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use warren_agent_core::policy::{FirstNumbers, MapWrite, PolicyEngine, PolicyEvent};
use warren_bpf::{Error, OwnerKind, PolicyPeerKind, PolicyVerdict, PolicyVerdictKey, Usage, monotonic_time};
use warren_keyd_core::policy::PolicyRepository;
use warren_model::{IdentityId, Labels, policy::NamedPorts};

use super::{Frame, Hook, Node, Seen, private};
use crate::oracle::{
    Cluster,
    differential::{config, events},
    loaded::write,
};

/// The pod that floods, and another one.
const FLOODER: u16 = 1;
const OTHER: u16 = 2;
const PEER: u32 = 70_000;

fn address(index: u16) -> IpAddr {
    IpAddr::from([10, 244, 0, index as u8])
}

fn peer(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0af5_0000 + number).into()
}

/// A policy engine with pods 1 and 2, and its writes.
struct Agent {
    repository: PolicyRepository,
    engine: PolicyEngine,
}

impl Agent {
    fn new() -> Self {
        Self {
            repository: PolicyRepository::new(config(&Cluster {
                name: "test".into(),
                ..Cluster::default()
            })),
            engine: PolicyEngine::new(FirstNumbers::default()),
        }
    }

    fn apply(&mut self, policy: &Value) -> Vec<MapWrite> {
        let name = warren_crds::cilium::policy_ref(policy).expect("an object");
        let outcome = warren_crds::cilium::parse(policy, "test");
        assert!(outcome.is_ok(), "{outcome:?}");
        let events = events(self.repository.upsert(&name, outcome));
        self.engine.apply(events)
    }

    fn identity(&mut self, number: u32, app: &str) -> Vec<MapWrite> {
        let labels = [("k8s:app", app), ("k8s:io.kubernetes.pod.namespace", "default")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let changes = self
            .repository
            .upsert_identity(IdentityId(number), &Labels(labels.into()));
        self.engine.apply(events(changes))
    }

    fn endpoint(&mut self, index: u16, identity: u32) -> Vec<MapWrite> {
        self.engine.apply([PolicyEvent::Endpoint {
            index,
            identity: IdentityId(identity),
            ports: NamedPorts::default(),
            audit: false,
        }])
    }
}

/// Pods `app: pod` let in who has `app: peer`, and nobody else, and are let out.
fn policy() -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "peers", "namespace": "default"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "pod"}},
            "ingress": [{"fromEndpoints": [{"matchLabels": {"app": "peer"}}]}],
        },
    })
}

/// A node with two pods, whose policies are in the maps, and one peer elsewhere.
fn scene(pins: &std::path::Path) -> Result<(Node, Agent)> {
    let mut node = Node::new(pins, 2)?;
    let mut agent = Agent::new();
    let mut writes = agent.identity(300, "pod");
    writes.extend(agent.identity(301, "pod"));
    writes.extend(agent.identity(PEER, "peer"));
    writes.extend(agent.apply(&policy()));
    for index in [FLOODER, OTHER] {
        let identity = 299 + u32::from(index);
        node.set_pod(index, &[address(index)], identity)?;
        writes.extend(agent.endpoint(index, identity));
    }
    for one in writes {
        write(&mut node.datapath, &one)?;
    }
    node.own(peer(1), OwnerKind::RemotePod, 1, PEER)?;
    node.datapath
        .set_node_address(IpAddr::from([172, 30, 0, 1]), true)?;
    node.datapath.raise_revision()?;
    Ok((node, agent))
}

fn frame(index: u16, port: u16, flags: u8) -> Frame {
    Frame {
        mac: Node::mac(index),
        source: address(index),
        destination: peer(1),
        protocol: 6,
        source_port: port,
        port: 80,
        tcp_flags: flags,
    }
}

/// The pod sends to the peer; whether it passes.
fn sends(node: &Node, index: u16, port: u16, flags: u8) -> bool {
    let seen = Seen {
        ingress_ifindex: node.device(index),
        mark: 0,
    };
    let frame = frame(index, port, flags).bytes();
    node.run(Hook::FromPod(index), &frame, seen).expect("runs").passed
}

/// The peer answers.
fn answered(node: &Node, index: u16, port: u16) -> bool {
    let reply = frame(index, port, Frame::SYN).reply([2, 0, 0, 0, 0, 9]).bytes();
    let seen = Seen {
        ingress_ifindex: node.tunnel,
        mark: node.decrypted(),
    };
    node.run(Hook::ToPod(index), &reply, seen).expect("runs").passed
}

/// The pod is sent something new by whom an address names.
fn is_sent(node: &Node, index: u16, from: IpAddr, port: u16) -> bool {
    let frame = Frame {
        mac: [2, 0, 0, 0, 0, 9],
        source: from,
        destination: address(index),
        ..frame(index, port, Frame::SYN)
    };
    let seen = Seen {
        ingress_ifindex: node.tunnel,
        mark: node.decrypted(),
    };
    node.run(Hook::ToPod(index), &frame.bytes(), seen)
        .expect("runs")
        .passed
}

fn dropped(node: &Node, reason: &str) -> u64 {
    let drops = node.datapath.drops().expect("reads the counters");
    drops
        .iter()
        .find(|(name, _)| name == reason)
        .map_or(0, |(_, n)| *n)
}

fn usage(node: &Node, map: &str) -> Usage {
    let all = node.datapath.usage().expect("counts");
    *all.iter().find(|usage| usage.map == map).expect("is listed")
}

#[test]
fn a_flood_of_flows_ends_at_the_pods_limit() {
    private(|pins| {
        let (mut node, _) = scene(pins)?;
        node.datapath.set_flow_limit(1_000)?;
        node.datapath.collect_flows(monotonic_time())?;
        for index in [FLOODER, OTHER] {
            ensure!(sends(&node, index, 1, Frame::SYN) && answered(&node, index, 1));
        }
        let mut events = node.datapath.events()?;
        while events.next().is_some() {}
        let passed = (0..20_000)
            .filter(|n| sends(&node, FLOODER, 2_000 + n, Frame::SYN))
            .count();
        ensure!(passed == 999, "{passed} flows beside the first one");
        ensure!(dropped(&node, "flow-limit") == 20_000 - 999);
        let reported = std::iter::from_fn(|| events.next())
            .find(|event| event.reason == Some("flow-limit"))
            .expect("the flood is reported");
        ensure!(reported.endpoint == Some(FLOODER) && reported.source == Some(address(FLOODER)));
        ensure!(
            sends(&node, FLOODER, 1, Frame::ACK) && answered(&node, FLOODER, 1),
            "what was there"
        );
        ensure!(
            sends(&node, OTHER, 1, Frame::ACK) && answered(&node, OTHER, 1),
            "the other pod's"
        );
        ensure!(
            sends(&node, OTHER, 2, Frame::SYN) && answered(&node, OTHER, 2),
            "and new ones"
        );
        let report = node.datapath.collect_flows(monotonic_time())?;
        ensure!(
            report.by_endpoint == BTreeMap::from([(FLOODER, 1_000), (OTHER, 2)]),
            "{report:?}"
        );
        // When what nobody answered is over, there is room again.
        let later = monotonic_time() + std::time::Duration::from_secs(150);
        let report = node.datapath.collect_flows(later)?;
        ensure!(report.removed == 999, "{report:?}");
        ensure!(sends(&node, FLOODER, 3, Frame::SYN));
        ensure!(answered(&node, FLOODER, 1), "what was there still is");
        Ok(())
    })
    .unwrap();
}

#[test]
fn without_an_agent_a_flood_takes_nothing_from_others() {
    private(|pins| {
        let (node, _) = scene(pins)?;
        for index in [FLOODER, OTHER] {
            ensure!(sends(&node, index, 1, Frame::SYN) && answered(&node, index, 1));
        }
        // More than any map holds, every connection answered; then half-open ones.
        let mut flooding = frame(FLOODER, 0, Frame::SYN);
        let (seen, back) = (
            Seen {
                ingress_ifindex: node.device(FLOODER),
                mark: 0,
            },
            Seen {
                ingress_ifindex: node.tunnel,
                mark: node.decrypted(),
            },
        );
        for number in 0..270_000_u32 {
            flooding.source_port = number as u16;
            flooding.port = 1_000 + (number >> 16) as u16;
            node.run(Hook::FromPod(FLOODER), &flooding.bytes(), seen)?;
            let reply = flooding.reply([2, 0, 0, 0, 0, 9]).bytes();
            node.run(Hook::ToPod(FLOODER), &reply, back)?;
        }
        let full = usage(&node, "FLOWS");
        ensure!(full.entries == full.limit, "{full:?}");
        for number in 0..70_000_u32 {
            flooding.source_port = number as u16;
            flooding.port = 2_000 + (number >> 16) as u16;
            node.run(Hook::FromPod(FLOODER), &flooding.bytes(), seen)?;
        }
        for index in [FLOODER, OTHER] {
            ensure!(
                sends(&node, index, 1, Frame::ACK) && answered(&node, index, 1),
                "pod {index}'s"
            );
        }
        ensure!(
            sends(&node, OTHER, 2, Frame::SYN) && answered(&node, OTHER, 2),
            "and new ones"
        );
        ensure!(sends(&node, OTHER, 2, Frame::ACK) && answered(&node, OTHER, 2));
        Ok(())
    })
    .unwrap();
}

#[test]
fn full_policy_maps_open_nothing() {
    private(|pins| {
        let (mut node, mut agent) = scene(pins)?;
        ensure!(sends(&node, OTHER, 1, Frame::SYN) && answered(&node, OTHER, 1));
        let verdict = PolicyVerdict { allow: true, rule: 1 };
        let key = |id| PolicyVerdictKey {
            class: u32::MAX,
            kind: PolicyPeerKind::Identity,
            id,
        };
        let (mut filled, limit) = (0, usage(&node, "POLICY_VERDICT").limit);
        let error = loop {
            match node.datapath.set_policy_verdict(key(filled), verdict) {
                Ok(()) => filled += 1,
                Err(error) => break error,
            }
        };
        ensure!(
            matches!(error, Error::Full { .. }) && filled + 100 > limit,
            "{error} at {filled}"
        );
        ensure!(usage(&node, "POLICY_VERDICT").entries == limit);
        // A peer that policy allows appears: there is no room to say so.
        let newcomer = agent.identity(PEER + 1, "peer");
        node.own(peer(2), OwnerKind::RemotePod, 1, PEER + 1)?;
        let failed = newcomer
            .iter()
            .find_map(|one| write(&mut node.datapath, one).err());
        ensure!(failed.is_some_and(|error| error.to_string().contains("full")));
        node.datapath.raise_revision()?;
        ensure!(
            !is_sent(&node, OTHER, peer(2), 5),
            "denied while there is no room"
        );
        ensure!(dropped(&node, "default-deny") > 0, "and counted");
        ensure!(is_sent(&node, OTHER, peer(1), 5), "others pass as before");
        ensure!(sends(&node, OTHER, 1, Frame::ACK) && answered(&node, OTHER, 1));
        for id in 0..filled {
            node.datapath.remove_policy_verdict(key(id))?;
        }
        for one in &newcomer {
            write(&mut node.datapath, one)?;
        }
        node.datapath.raise_revision()?;
        ensure!(is_sent(&node, OTHER, peer(2), 6), "with room again");
        Ok(())
    })
    .unwrap();
}

#[test]
fn sixty_five_thousand_identities() {
    const FIRST: u32 = 1_000;
    const COUNT: u32 = 65_000;
    private(|pins| {
        let (mut node, mut agent) = scene(pins)?;
        for number in FIRST..FIRST + COUNT {
            // One in a hundred is nobody that the policy lets in.
            let app = if number % 100 == 0 { "stranger" } else { "peer" };
            for one in agent.identity(number, app) {
                write(&mut node.datapath, &one)?;
            }
            node.own(peer(number), OwnerKind::RemotePod, 1, number)?;
        }
        node.datapath.raise_revision()?;
        ensure!(node.datapath.policy_contents()?.verdicts.len() as u32 >= COUNT / 100 * 99);
        let mut let_in = 0;
        for number in (FIRST..FIRST + COUNT).step_by(7) {
            let passed = is_sent(&node, OTHER, peer(number), (number % 60_000) as u16 + 1);
            ensure!(passed == (number % 100 != 0), "identity {number}");
            let_in += u32::from(passed);
        }
        ensure!(let_in > 9_000);
        ensure!(usage(&node, "OWNERS4").entries > COUNT);
        Ok(())
    })
    .unwrap();
}
