//! The directory as values, and what changes of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use warren_model::{
    IdentityId, Labels, NodeName, NodeRecord, WorkloadRecord,
    policy::{NodeFacts, PolicyRef, Rule, Selector, SelectorId},
};

use crate::slots::newer;

/// An entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A node.
    Node(NodeRecord),
    /// The labels of an identity.
    Identity(IdentityId, Arc<Labels>),
    /// The owner of a pod address.
    Workload(WorkloadRecord),
    /// What a selector asks for.
    Selector(SelectorId, Selector),
    /// Members of a selector in one block of identities.
    Members(SelectorId, u32, BTreeSet<IdentityId>),
    /// All rules of a policy object.
    Rules(PolicyRef, Vec<Rule<SelectorId>>),
    /// What policy has to know of a node.
    Facts(NodeName, NodeFacts),
}

impl Entry {
    /// What the entry is filed under.
    pub fn key(&self) -> EntryKey {
        match self {
            Self::Node(node) => EntryKey::Node(node.name.clone()),
            Self::Identity(identity, _) => EntryKey::Identity(*identity),
            Self::Workload(workload) => EntryKey::Workload(workload.ip),
            Self::Selector(id, _) => EntryKey::Selector(*id),
            Self::Members(id, block, _) => EntryKey::Members(*id, *block),
            Self::Rules(policy, _) => EntryKey::Rules(policy.clone()),
            Self::Facts(node, _) => EntryKey::Facts(node.clone()),
        }
    }
}

/// What an entry is filed under.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKey {
    /// A node.
    Node(NodeName),
    /// An identity.
    Identity(IdentityId),
    /// A pod's address.
    Workload(IpAddr),
    /// A selector.
    Selector(SelectorId),
    /// Members of a selector, by block.
    Members(SelectorId, u32),
    /// A policy object.
    Rules(PolicyRef),
    /// Facts of a node.
    Facts(NodeName),
}

impl EntryKey {
    /// Whether it is a selector's, a rule's or the members'.
    pub fn is_policy(&self) -> bool {
        matches!(self, Self::Selector(_) | Self::Members(..) | Self::Rules(_))
    }
}

/// What one version of the directory changed: only entries that differ from those before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Epoch of the version.
    pub epoch: u64,
    /// Its number within the epoch.
    pub version: u64,
    /// This is the whole directory: what is not among `upserts` is gone.
    pub whole: bool,
    /// New and changed entries.
    pub upserts: Vec<Entry>,
    /// Entries that are gone.
    pub removes: Vec<EntryKey>,
    /// Entries of policy that cannot be read: they stay as they were.
    pub keeps: Vec<EntryKey>,
}

impl Change {
    /// Whether anything but selectors, their members and rules changed.
    pub fn concerns_mesh(&self) -> bool {
        let entry =
            |entry: &Entry| matches!(entry, Entry::Selector(..) | Entry::Members(..) | Entry::Rules(..));
        self.whole || !self.removes.iter().all(EntryKey::is_policy) || !self.upserts.iter().all(entry)
    }
}

/// The part of the directory that says who and where nodes and pods are, as `keyd` published it and as its signature
/// and digest proved it. Selectors, members and rules are kept by [`PolicySource`](crate::policy::PolicySource).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// Epoch of the manifest.
    pub epoch: u64,
    /// Version within the epoch.
    pub version: u64,
    /// Nodes. The order of their names is the order of ownership.
    pub nodes: BTreeMap<NodeName, NodeRecord>,
    /// Labels of identities.
    pub identities: BTreeMap<IdentityId, Arc<Labels>>,
    /// Pods by address.
    pub workloads: BTreeMap<IpAddr, WorkloadRecord>,
    /// What policy has to know of nodes.
    pub facts: BTreeMap<NodeName, NodeFacts>,
}

impl Directory {
    /// Takes a change. Returns whether nodes changed.
    pub fn apply(&mut self, change: &Change) -> bool {
        (self.epoch, self.version) = (change.epoch, change.version);
        let mut nodes = change.whole;
        let mut known = BTreeMap::new();
        if change.whole {
            known = std::mem::take(&mut self.nodes);
            *self = Self {
                epoch: change.epoch,
                version: change.version,
                ..Self::default()
            };
        }
        for key in &change.removes {
            match key {
                EntryKey::Node(name) => nodes |= self.nodes.remove(name).is_some(),
                EntryKey::Identity(identity) => drop(self.identities.remove(identity)),
                EntryKey::Workload(address) => drop(self.workloads.remove(address)),
                EntryKey::Facts(name) => drop(self.facts.remove(name)),
                EntryKey::Selector(_) | EntryKey::Members(..) | EntryKey::Rules(_) => {}
            }
        }
        for entry in &change.upserts {
            match entry {
                Entry::Node(node) => {
                    nodes = true;
                    let before = self.nodes.get(&node.name).or_else(|| known.get(&node.name));
                    let node = with_newest_keys(before, node.clone());
                    self.nodes.insert(node.name.clone(), node);
                }
                Entry::Identity(identity, labels) => {
                    self.identities.insert(*identity, labels.clone());
                }
                Entry::Workload(workload) => {
                    self.workloads.insert(workload.ip, workload.clone());
                }
                Entry::Facts(name, facts) => {
                    self.facts.insert(name.clone(), facts.clone());
                }
                Entry::Selector(..) | Entry::Members(..) | Entry::Rules(..) => {}
            }
        }
        nodes
    }
}

/// The keys of a node never go back: a record that would set them back comes from a leader that has not seen the newest,
/// and says nothing about keys.
fn with_newest_keys(known: Option<&NodeRecord>, mut offered: NodeRecord) -> NodeRecord {
    if let Some(known) = known.filter(|known| !newer(&known.keys(), &offered.keys())) {
        offered.slots.clone_from(&known.slots);
        (offered.active, offered.last) = (known.active, known.last);
    }
    offered
}

#[cfg(test)]
mod tests {
    use warren_model::{PublicKey, SlotKey};

    use super::*;

    fn node(uid: &str, generation: u64) -> NodeRecord {
        let slot = SlotKey {
            slot: 0,
            port: 51871,
            generation,
            public_key: PublicKey::from_bytes([generation as u8 + 1; 32]).unwrap(),
            pre_shared_keys: false,
        };
        NodeRecord {
            name: "node2".into(),
            uid: uid.into(),
            endpoints: vec![],
            addresses: vec![],
            prefixes: vec![format!("10.244.{generation}.0/24").parse().unwrap()],
            slots: vec![slot],
            active: generation,
            last: generation,
            datapath: None,
        }
    }

    #[test]
    fn keys_never_go_back_but_those_of_a_new_node_are_its_own() {
        for whole in [true, false] {
            let change = |node| Change {
                whole,
                upserts: vec![Entry::Node(node)],
                ..Change::default()
            };
            let mut directory = Directory::default();
            directory.apply(&change(node("uid", 3)));
            directory.apply(&change(node("uid", 1)));
            let kept = &directory.nodes[&"node2".into()];
            assert_eq!((kept.active, kept.last, kept.slots[0].generation), (3, 3, 3));
            assert_eq!(kept.prefixes, node("uid", 1).prefixes, "the rest is the newest");
            directory.apply(&change(node("another", 1)));
            assert_eq!(directory.nodes[&"node2".into()], node("another", 1));
        }
    }
}
