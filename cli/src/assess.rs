//! Is the cluster's traffic encrypted? A pure judgement over what `keyd` and the agents report.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use warren_keyd_api::status::{AgentReport, ClusterStatus, NodeStatus, PeerReport, Slot};

use crate::keys::Rotation;

/// The judgement.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Assessment {
    /// Nothing is wrong.
    pub(crate) healthy: bool,
    /// Encryption is on in the configuration.
    pub(crate) encryption: bool,
    /// Nodes whose every pair is encrypted and whose agent finds nothing wrong.
    pub(crate) encrypted_nodes: usize,
    /// By name.
    pub(crate) nodes: Vec<Node>,
    /// Each pair once.
    pub(crate) pairs: Vec<Pair>,
    /// Pairs with a post-quantum pre-shared key.
    pub(crate) pre_shared_pairs: usize,
    /// Why others have none, and how many.
    pub(crate) no_pre_shared_key: BTreeMap<String, usize>,
    /// Seconds since the oldest of the pairs' last handshakes; `None` where a pair has none, or there is no pair.
    pub(crate) oldest_handshake_seconds: Option<u64>,
    /// What is wrong, a sentence each.
    pub(crate) problems: Vec<String>,
    /// What is not tunnelled, and on how many nodes.
    pub(crate) exemptions: BTreeMap<String, usize>,
    /// Packets dropped on all nodes, by reason.
    pub(crate) drops: BTreeMap<String, u64>,
    /// Rotations of keys that are under way.
    pub(crate) rotations: Vec<Rotation>,
}

/// A node in the judgement.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) encrypted: bool,
    pub(crate) connected: bool,
    /// `kernel`, `userspace` or empty.
    pub(crate) datapath: String,
    /// The key that is sent with; empty without one.
    pub(crate) public_key: String,
    /// Generation of that key.
    pub(crate) generation: u64,
    /// Pairs that are encrypted.
    pub(crate) encrypted_peers: usize,
    /// Pairs that there should be.
    pub(crate) peers: usize,
    /// Pods that the agent manages.
    pub(crate) pods: u32,
    /// Packets dropped.
    pub(crate) drops: u64,
}

/// Two nodes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pair {
    pub(crate) nodes: [String; 2],
    pub(crate) encrypted: bool,
    /// Seconds since the last handshake, at the end where it is longer ago.
    pub(crate) handshake_seconds: Option<u64>,
    /// Both ends have a post-quantum pre-shared key.
    pub(crate) pre_shared_key: bool,
    /// Why not; empty where they have, or where an end does not say.
    pub(crate) no_pre_shared_key: String,
    /// What is wrong with the pair; empty where nothing is.
    pub(crate) problems: Vec<String>,
}

/// Judges `status` at the time `now` in Unix milliseconds. `rotations`: those that are under way.
pub(crate) fn assess(status: &ClusterStatus, rotations: Vec<Rotation>, now: i64) -> Assessment {
    let mut problems = cluster_problems(status);
    let mut broken: BTreeSet<&str> = BTreeSet::new();
    for node in &status.nodes {
        let found = node_problems(node, status, now);
        if !found.is_empty() {
            broken.insert(&node.name);
        }
        problems.extend(
            found
                .into_iter()
                .map(|problem| format!("node {}: {problem}", node.name)),
        );
    }
    let mut pairs = Vec::new();
    for (index, a) in status.nodes.iter().enumerate() {
        // A pair with a node that has no key, or no report, is not judged again: the node's own sentence says it.
        pairs.extend(status.nodes[index + 1..].iter().map(|b| pair(a, b, now)));
    }
    problems.extend(pairs.iter().flat_map(|pair| pair.problems.clone()));
    let nodes: Vec<Node> = status
        .nodes
        .iter()
        .map(|node| summary(node, &pairs, broken.contains(node.name.as_str())))
        .collect();
    let mut exemptions = BTreeMap::new();
    let mut drops = BTreeMap::new();
    for report in status.nodes.iter().filter_map(|node| node.agent.as_ref()) {
        for exemption in &report.exemptions {
            *exemptions.entry(exemption.clone()).or_default() += 1;
        }
        for (reason, packets) in &report.drops {
            *drops.entry(reason.clone()).or_default() += packets;
        }
    }
    let mut no_pre_shared_key = BTreeMap::new();
    for pair in pairs.iter().filter(|pair| !pair.no_pre_shared_key.is_empty()) {
        *no_pre_shared_key
            .entry(pair.no_pre_shared_key.clone())
            .or_default() += 1;
    }
    Assessment {
        pre_shared_pairs: pairs.iter().filter(|pair| pair.pre_shared_key).count(),
        no_pre_shared_key,
        healthy: problems.is_empty(),
        encryption: status.encryption,
        encrypted_nodes: nodes.iter().filter(|node| node.encrypted).count(),
        oldest_handshake_seconds: pairs
            .iter()
            .map(|pair| pair.handshake_seconds)
            .collect::<Option<Vec<_>>>()
            .and_then(|ages| ages.into_iter().max()),
        nodes,
        pairs,
        problems,
        exemptions,
        drops,
        rotations,
    }
}

fn cluster_problems(status: &ClusterStatus) -> Vec<String> {
    let mut problems = Vec::new();
    if !status.encryption {
        problems.push(
            "encryption is off in the cluster's configuration: traffic between nodes is in clear".into(),
        );
    }
    if !status.leader {
        let leader = match status.leader_address.as_str() {
            "" => "there is no leader".to_owned(),
            address => format!("the leader is at {address}"),
        };
        problems.push(format!(
            "this keyd does not lead and knows no node's state: {leader}"
        ));
    } else if status.nodes.is_empty() {
        problems.push("keyd knows no node: no agent has joined yet, or keyd sees no Node objects".into());
    }
    problems.extend(status.problems.iter().map(|problem| format!("keyd: {problem}")));
    problems
}

fn node_problems(node: &NodeStatus, status: &ClusterStatus, now: i64) -> Vec<String> {
    let mut problems = Vec::new();
    if !node.connected {
        problems.push(match age(node.last_seen_unix_ms, now) {
            Some(seconds) => format!(
                "its agent is not connected to keyd, last seen {} ago",
                span(seconds)
            ),
            None => "its agent has never connected to keyd: is it running?".to_owned(),
        });
    }
    if node.slots.is_empty() {
        problems.push("it has no accepted key: nothing can be sent to it encrypted".into());
    }
    let Some(report) = &node.agent else {
        if node.connected {
            problems.push("its agent has not reported yet".into());
        }
        return problems;
    };
    if !report.encryption && status.encryption && report.problems.is_empty() {
        problems.push("its agent reports that encryption is not in effect".into());
    }
    problems.extend(report.problems.iter().cloned());
    if !outdated(node) {
        problems.extend(key_problems(node, report));
        problems.extend(strangers(report, status));
    }
    problems
}

/// The agent has applied a newer directory than its report is about: reports come every few seconds, keys change at once.
fn outdated(node: &NodeStatus) -> bool {
    let report = node.agent.as_ref().map(|report| (report.epoch, report.version));
    report.is_some_and(|report| report < (node.applied_epoch, node.applied_version))
}

/// The node's devices must have the keys that the directory publishes. A key has two slots, and a slot that no pair
/// needs has no device: what counts is that the key is there, and that no slot has another one.
fn key_problems(node: &NodeStatus, report: &AgentReport) -> Vec<String> {
    let other = |published: &Slot| {
        let device = report.slots.iter().find(|slot| slot.slot == published.slot)?;
        (device.public_key != published.public_key).then(|| {
            format!(
                "slot {} has the key {} but the directory says {}",
                published.slot,
                short(&device.public_key),
                short(&published.public_key)
            )
        })
    };
    let mut problems: Vec<String> = node.slots.iter().filter_map(other).collect();
    let on_node = |key: &Slot| report.slots.iter().any(|slot| slot.public_key == key.public_key);
    if let Some(key) = active(node).filter(|key| !on_node(key) && problems.is_empty()) {
        problems.push(format!(
            "key generation {} is published but on no device of the node",
            key.generation
        ));
    }
    problems
}

/// The key that is sent with. A `keyd` that does not say which one it is publishes one alone.
fn active(node: &NodeStatus) -> Option<&Slot> {
    let named = node.slots.iter().find(|slot| slot.generation == node.active);
    named.or_else(|| node.slots.iter().max_by_key(|slot| slot.generation))
}

/// Peers on a device that the directory does not know.
fn strangers(report: &AgentReport, status: &ClusterStatus) -> Vec<String> {
    let known: BTreeSet<&str> = status
        .nodes
        .iter()
        .flat_map(|node| &node.slots)
        .map(|slot| slot.public_key.as_str())
        .collect();
    let stranger = |peer: &&PeerReport| !known.contains(peer.public_key.as_str());
    report
        .peers
        .iter()
        .filter(stranger)
        .map(|peer| {
            format!(
                "it still has a peer with the key {}, which belongs to no node",
                short(&peer.public_key)
            )
        })
        .collect()
}

fn pair(a: &NodeStatus, b: &NodeStatus, now: i64) -> Pair {
    let mut pair = Pair {
        nodes: [a.name.clone(), b.name.clone()],
        encrypted: false,
        handshake_seconds: None,
        pre_shared_key: false,
        no_pre_shared_key: String::new(),
        problems: Vec::new(),
    };
    let (Some(from_a), Some(from_b)) = (&a.agent, &b.agent) else {
        return pair;
    };
    if a.slots.is_empty() || b.slots.is_empty() {
        return pair;
    }
    // Both ends must report the same two keys. During a rotation there may be several such paths: take the best.
    let agreed = peers_of(from_a, &b.name).flat_map(|x| {
        peers_of(from_b, &a.name)
            .filter(|y| x.public_key == y.own_public_key && x.own_public_key == y.public_key)
            .map(move |y| (x, y))
    });
    let current = agreed.filter(|(x, _)| {
        outdated(a) || outdated(b) || (publishes(a, &x.own_public_key) && publishes(b, &x.public_key))
    });
    let best = current.max_by_key(|(x, y)| {
        (
            x.ready && y.ready,
            x.last_handshake_unix_ms.min(y.last_handshake_unix_ms),
        )
    });
    let Some((x, y)) = best else {
        pair.problems.push(disagreement(a, b, from_a, from_b));
        return pair;
    };
    pair.pre_shared_key = x.pre_shared_key && y.pre_shared_key;
    pair.no_pre_shared_key = [(x, a), (y, b)]
        .into_iter()
        .find(|(peer, _)| !peer.no_pre_shared_key.is_empty())
        .map(|(peer, node)| format!("node {}: {}", node.name, peer.no_pre_shared_key))
        .unwrap_or_default();
    let ages = [x, y].map(|peer| age(peer.last_handshake_unix_ms, now));
    pair.handshake_seconds = match ages {
        [Some(x), Some(y)] => Some(x.max(y)),
        _ => None,
    };
    for (peer, from, to, age) in [(x, a, b, ages[0]), (y, b, a, ages[1])] {
        if !peer.ready {
            let when = age.map_or_else(|| "never".to_owned(), |seconds| format!("{} ago", span(seconds)));
            pair.problems.push(format!(
                "{} and {}: {} has no fresh handshake with {} (last: {when}): is UDP between them open?",
                a.name, b.name, from.name, to.name
            ));
        }
    }
    pair.encrypted = pair.problems.is_empty();
    pair
}

fn peers_of<'a>(report: &'a AgentReport, node: &'a str) -> impl Iterator<Item = &'a PeerReport> {
    report.peers.iter().filter(move |peer| peer.node == node)
}

fn publishes(node: &NodeStatus, key: &str) -> bool {
    node.slots.iter().any(|slot| slot.public_key == key)
}

fn disagreement(a: &NodeStatus, b: &NodeStatus, from_a: &AgentReport, from_b: &AgentReport) -> String {
    let missing: Vec<String> = [(a, b, from_a), (b, a, from_b)]
        .into_iter()
        .filter(|(_, other, report)| peers_of(report, &other.name).next().is_none())
        .map(|(node, other, _)| format!("{} has no peer for {}", node.name, other.name))
        .collect();
    let what = match missing.is_empty() {
        true => "the two ends do not agree on each other's current keys".to_owned(),
        false => missing.join(" and "),
    };
    format!("{} and {}: {what}", a.name, b.name)
}

fn summary(node: &NodeStatus, pairs: &[Pair], broken: bool) -> Node {
    let mine = || pairs.iter().filter(|pair| pair.nodes.contains(&node.name));
    let (peers, encrypted_peers) = (mine().count(), mine().filter(|pair| pair.encrypted).count());
    let key = active(node);
    Node {
        name: node.name.clone(),
        encrypted: !broken
            && encrypted_peers == peers
            && node.agent.as_ref().is_some_and(|agent| agent.encryption),
        connected: node.connected,
        datapath: node.datapath.clone(),
        public_key: key.map(|slot| slot.public_key.clone()).unwrap_or_default(),
        generation: key.map(|slot| slot.generation).unwrap_or_default(),
        encrypted_peers,
        peers,
        pods: node
            .agent
            .as_ref()
            .map(|agent| agent.endpoints)
            .unwrap_or_default(),
        drops: node
            .agent
            .as_ref()
            .map(|agent| agent.drops.values().sum())
            .unwrap_or_default(),
    }
}

/// Seconds since `then`, which 0 means never; clocks may differ a little.
fn age(then: i64, now: i64) -> Option<u64> {
    (then > 0).then(|| u64::try_from(now - then).unwrap_or(0) / 1000)
}

/// A time span for people: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`.
pub(crate) fn span(seconds: u64) -> String {
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big} {big_unit}"),
        _ => format!("{big} {big_unit} {small} {small_unit}"),
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86400, "d", seconds % 86400 / 3600, "h"),
    }
}

/// The beginning of a key, enough to tell two apart.
pub(crate) fn short(key: &str) -> String {
    match key.char_indices().nth(12) {
        Some((end, _)) => format!("{}...", &key[..end]),
        None => key.to_owned(),
    }
}

#[cfg(test)]
#[path = "assess_tests.rs"]
mod tests;
