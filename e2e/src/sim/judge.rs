//! The reference: what must hold, whatever the machines do.

use std::{collections::HashMap, fmt};

use warren_keyd_core::rotation::NodeKeys;
use warren_model::PublicKey;

use super::{Micros, NodeId};

/// Something that must never happen did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Virtual microseconds since the beginning.
    pub at: u64,
    /// A sentence.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6} s: {}", self.at as f64 / 1e6, self.what)
    }
}

/// What the judge has seen.
#[derive(Debug)]
pub(super) struct Judge {
    nodes: usize,
    /// Whether packets from one node to another must arrive.
    steady: Vec<bool>,
    /// Counts disturbances: a packet from before one proves nothing.
    eras: Vec<u32>,
    /// Nodes that have not applied a directory of keyd's since they booted.
    booting: Vec<bool>,
    keys: HashMap<(String, u64), PublicKey>,
    pub(super) judged: u64,
    pub(super) commits: u64,
    pub(super) withdrawals: u64,
    pub(super) pre_shared_keys: u64,
    pub(super) forgotten: u64,
    pub(super) found: Vec<Violation>,
}

impl Judge {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            nodes,
            steady: vec![false; nodes * nodes],
            eras: vec![0; nodes * nodes],
            booting: vec![false; nodes],
            keys: HashMap::new(),
            judged: 0,
            commits: 0,
            withdrawals: 0,
            pre_shared_keys: 0,
            forgotten: 0,
            found: Vec::new(),
        }
    }

    pub(super) fn is_steady(&self, from: NodeId, to: NodeId) -> bool {
        self.steady[from * self.nodes + to]
    }

    /// How often nothing could be expected from one node to another.
    pub(super) fn era(&self, from: NodeId, to: NodeId) -> u32 {
        self.eras[from * self.nodes + to]
    }

    pub(super) fn delivered(&mut self, from: NodeId, to: NodeId, judged: bool) {
        self.steady[from * self.nodes + to] = !self.booting[from] && !self.booting[to];
        self.judged += u64::from(judged);
    }

    /// Nothing can be expected between two nodes until a packet arrives again.
    pub(super) fn disturb(&mut self, a: NodeId, b: NodeId) {
        for pair in [a * self.nodes + b, b * self.nodes + a] {
            self.steady[pair] = false;
            self.eras[pair] += 1;
        }
    }

    pub(super) fn disturb_all(&mut self, node: NodeId) {
        for other in 0..self.nodes {
            self.disturb(node, other);
        }
    }

    /// The node loses its devices. Its disk may be older than what it last told others, or have lost its key, so nothing
    /// is expected of it until it has applied what keyd says now, and has and uses the keys that are active.
    pub(super) fn boots(&mut self, node: NodeId) {
        self.booting[node] = true;
        self.disturb_all(node);
    }

    pub(super) fn is_booting(&self, node: NodeId) -> bool {
        self.booting[node]
    }

    pub(super) fn applied(&mut self, node: NodeId) {
        if std::mem::replace(&mut self.booting[node], false) {
            self.disturb_all(node);
        }
    }

    pub(super) fn violation(&mut self, at: Micros, what: String) {
        self.found.push(Violation { at, what });
    }

    /// The durable keys of a node change.
    pub(super) fn written(&mut self, now: Micros, node: NodeId, was: &NodeKeys, keys: &NodeKeys) {
        if was.uid == keys.uid && (keys.active < was.active || keys.last < was.last) {
            self.violation(
                now,
                format!(
                    "node {node}: active and last went back from {} and {} to {} and {}",
                    was.active, was.last, keys.active, keys.last
                ),
            );
        }
        if keys.active > was.active {
            self.commits += 1;
        }
        if was.candidate().is_some_and(|candidate| !keys.lists(candidate)) {
            self.withdrawals += 1;
        }
        for slot in &keys.slots {
            let known = self
                .keys
                .entry((keys.uid.to_string(), slot.generation))
                .or_insert(slot.public_key);
            if *known != slot.public_key {
                let sentence = format!("node {node}: generation {} has a second key", slot.generation);
                self.violation(now, sentence);
            }
        }
        if !keys.slots.is_empty() && !keys.lists(keys.active) {
            self.violation(now, format!("node {node}: its active key is not published"));
        }
    }
}
