//! Nodes: incarnations, keys, claims, tombstones.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    ClusterConfig, Datapath, NodeKeys, NodeName, NodeRecord, NodeUid, PrefixSource, PublicKey,
    directory::Refusal,
};

mod keys;

use self::keys::public_keys;
use crate::{
    claims::Claims,
    event::Node,
    keys::Keys,
    stored::{Revoked, StoredNode},
};

/// How many replaced keys of a living node are remembered. The keys of dead nodes are all kept.
const REPLACED_KEYS: usize = 256;
/// A node may have new keys this often per [`KEY_WINDOW_MS`]: no honest one comes near.
const KEYS_PER_WINDOW: usize = 600;
const KEY_WINDOW_MS: u64 = 3_600_000;

/// A node that exists.
#[derive(Debug)]
struct Present {
    uid: NodeUid,
    order: u64,
    source: Node,
    /// As they are stored; changed by [`Nodes::found`] alone.
    keys: NodeKeys,
    since: BTreeMap<u64, u64>,
    datapath: Option<Datapath>,
    revoked: Vec<Revoked>,
    key_changes: Vec<u64>,
}

/// A node that is gone, or that was stored and has not been seen yet in this term.
#[derive(Debug)]
struct Past {
    order: u64,
    record: Option<NodeRecord>,
    since: BTreeMap<u64, u64>,
    revoked: Vec<Revoked>,
}

/// An incarnation that came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Buried {
    pub(crate) node: NodeName,
    pub(crate) uid: NodeUid,
    pub(crate) keys: Vec<PublicKey>,
}

/// All nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    config: ClusterConfig,
    present: BTreeMap<NodeName, Present>,
    past: BTreeMap<NodeName, Past>,
    refused_nodes: BTreeMap<NodeName, String>,
    keys: Keys,
    claims: Claims,
    checked: BTreeMap<NodeName, NodeRecord>,
    refusals: Vec<Refusal>,
    /// Those that are news.
    new_refusals: Vec<Refusal>,
    next_order: u64,
    dirty: bool,
    /// Nodes whose durable part or record may have changed.
    changed: BTreeSet<NodeName>,
    buried: Vec<Buried>,
}

impl Nodes {
    pub(crate) fn new(config: ClusterConfig, stored: Vec<StoredNode>) -> Self {
        let mut out = Self {
            config,
            present: BTreeMap::new(),
            past: BTreeMap::new(),
            refused_nodes: BTreeMap::new(),
            keys: Keys::default(),
            claims: Claims::default(),
            checked: BTreeMap::new(),
            refusals: vec![],
            new_refusals: vec![],
            next_order: 1,
            dirty: true,
            changed: BTreeSet::new(),
            buried: vec![],
        };
        let mut stored = stored;
        stored.sort_by_key(|node| node.order);
        for node in &stored {
            for revoked in &node.revoked {
                for key in &revoked.keys {
                    out.keys.revoke(*key, &node.name, &revoked.uid);
                }
            }
        }
        for StoredNode {
            name,
            order,
            record,
            since,
            revoked,
        } in stored
        {
            out.next_order = out.next_order.max(order + 1);
            if let Some(record) = &record {
                // The store is ours and signed; still, one bad entry must not break the rule for all: a key that is not
                // this node's is not published.
                for slot in &record.slots {
                    let _ = out.keys.claim(slot.public_key, &name);
                }
                out.claims.seed(record);
            }
            out.past.insert(
                name,
                Past {
                    order,
                    record,
                    since,
                    revoked,
                },
            );
        }
        out
    }

    /// A Node appeared or changed. Returns true where this is another incarnation than before: everything that
    /// belonged to the old one must go.
    pub(crate) fn upsert(&mut self, node: Node) -> bool {
        let name = node.name.clone();
        let uid = self.effective_uid(&node);
        self.dirty = true;
        self.changed.insert(name.clone());
        if let Some(present) = self.present.get_mut(&name).filter(|present| present.uid == uid) {
            present.source = node;
            return false;
        }
        let was_present = self.bury(&name, &uid);
        let past = self.past.remove(&name);
        let dead = past
            .as_ref()
            .is_some_and(|past| dead_uids(past).any(|dead| *dead == uid));
        if dead {
            self.refused_nodes.insert(
                name.clone(),
                format!(
                    "node {name}: UID {uid} belonged to a Node that was deleted or revoked; register it with a new UID"
                ),
            );
            self.past.extend(past.map(|past| (name, past)));
            return was_present;
        }
        self.refused_nodes.remove(&name);
        let present = self.incarnate(uid, node, past);
        self.present.insert(name, present);
        was_present
    }

    fn incarnate(&mut self, uid: NodeUid, source: Node, past: Option<Past>) -> Present {
        let mut present = Present {
            keys: NodeKeys::none(uid.clone()),
            uid,
            order: self.next_order,
            source,
            since: BTreeMap::new(),
            datapath: None,
            revoked: vec![],
            key_changes: vec![],
        };
        if let Some(past) = past {
            present.revoked = past.revoked;
            if let Some(record) = past.record {
                present.order = past.order;
                present.datapath = record.datapath;
                present.since = past.since;
                present.keys = record.keys();
            }
        }
        if present.order == self.next_order {
            self.next_order += 1;
        }
        present
    }

    /// A derived UID gets a counter of the dead incarnations behind it.
    fn effective_uid(&self, node: &Node) -> NodeUid {
        if !node.uid_derived {
            return node.uid.clone();
        }
        let dead = match (self.present.get(&node.name), self.past.get(&node.name)) {
            (Some(present), _) => present.revoked.iter().filter(|r| r.uid != present.uid).count(),
            (None, Some(past)) => dead_uids(past).count(),
            (None, None) => 0,
        };
        if dead == 0 {
            node.uid.clone()
        } else {
            format!("{}-r{dead}", node.uid).into()
        }
    }

    /// A Node is gone: its keys never come back. Returns whether it was there.
    pub(crate) fn delete(&mut self, name: &NodeName) -> bool {
        self.refused_nodes.remove(name);
        self.bury(name, &"".into())
    }

    /// Ends an incarnation although its Node exists: its keys never come back, its agent is nobody. A Node that has a UID of
    /// its own comes back with another one only; one whose UID is derived is another node from now on.
    pub(crate) fn revoke(&mut self, name: &NodeName) -> bool {
        let Some(source) = self.present.get(name).map(|present| present.source.clone()) else {
            return false;
        };
        self.bury(name, &"".into());
        self.upsert(source);
        true
    }

    /// Claims that were refused since the last call.
    pub(crate) fn take_refusals(&mut self) -> Vec<Refusal> {
        std::mem::take(&mut self.new_refusals)
    }

    /// Incarnations that came to their end since the last call.
    pub(crate) fn take_buried(&mut self) -> Vec<Buried> {
        std::mem::take(&mut self.buried)
    }

    /// Turns every incarnation of a name but `except` into a tombstone.
    fn bury(&mut self, name: &NodeName, except: &NodeUid) -> bool {
        let was_present = self.present.contains_key(name);
        let (order, uid, keys, mut revoked) = if let Some(present) = self.present.remove(name) {
            (
                present.order,
                present.uid,
                public_keys(&present.keys),
                present.revoked,
            )
        } else if let Some(past) = self.past.get(name)
            && let Some(record) = past.record.as_ref().filter(|record| record.uid != *except)
        {
            let keys = public_keys(&record.keys());
            (past.order, record.uid.clone(), keys, past.revoked.clone())
        } else {
            return false;
        };
        for key in &keys {
            self.keys.revoke(*key, name, &uid);
        }
        self.buried.push(Buried {
            node: name.clone(),
            uid: uid.clone(),
            keys: keys.clone(),
        });
        match revoked.iter_mut().find(|revoked| revoked.uid == uid) {
            Some(entry) => entry.keys.extend(keys),
            None => revoked.push(Revoked { uid, keys }),
        }
        self.past.insert(
            name.clone(),
            Past {
                order,
                record: None,
                since: BTreeMap::new(),
                revoked,
            },
        );
        self.dirty = true;
        self.changed.insert(name.clone());
        was_present
    }

    /// The source is complete: what was stored and is not in it was deleted while nobody watched.
    pub(crate) fn synced(&mut self) {
        let gone: Vec<_> = self
            .past
            .iter()
            .filter(|(_, past)| past.record.is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.bury(&name, &"".into());
        }
    }

    pub(crate) fn uid(&self, name: &NodeName) -> Option<&NodeUid> {
        self.present.get(name).map(|present| &present.uid)
    }

    /// Looks at the durable part of a node again.
    pub(crate) fn touch(&mut self, name: &NodeName) {
        self.changed.insert(name.clone());
    }

    pub(crate) fn set_datapath(&mut self, name: &NodeName, datapath: Option<Datapath>) {
        let Some(present) = self.present.get_mut(name) else {
            return;
        };
        if datapath.is_some() && present.datapath != datapath {
            present.datapath = datapath;
            self.dirty = true;
            self.changed.insert(name.clone());
        }
    }

    /// Applies the directory rules if anything changed. Returns whether it did.
    pub(crate) fn settle(&mut self) -> bool {
        if !std::mem::take(&mut self.dirty) {
            return false;
        }
        let mut order: Vec<_> = self.present.iter().collect();
        order.sort_by_key(|(_, present)| present.order);
        let claimed: Vec<_> = order
            .into_iter()
            .map(|(name, present)| self.claimed(name, present))
            .collect();
        let checked = self.claims.settle(&self.config, &claimed);
        let names: BTreeSet<_> = self.checked.keys().chain(checked.nodes.keys()).cloned().collect();
        for name in names {
            if self.checked.get(&name) != checked.nodes.get(&name) {
                self.changed.insert(name);
            }
        }
        let news = checked
            .refused
            .iter()
            .filter(|refusal| !self.refusals.contains(refusal));
        self.new_refusals.extend(news.cloned());
        self.checked = checked.nodes;
        self.refusals = checked.refused;
        true
    }

    fn claimed(&self, name: &NodeName, present: &Present) -> NodeRecord {
        let prefixes = match self.config.prefix_source {
            PrefixSource::PodCidr => present.source.pod_cidrs.clone(),
            PrefixSource::PodIp => vec![],
        };
        let mut slots = present.keys.slots.clone();
        slots.retain(|slot| self.keys.may_claim(slot.public_key, name).is_ok());
        NodeRecord {
            name: name.clone(),
            uid: present.uid.clone(),
            endpoints: present.source.addresses.clone(),
            addresses: present.source.addresses.clone(),
            prefixes,
            slots,
            active: present.keys.active,
            last: present.keys.last,
            datapath: present.datapath,
        }
    }

    /// Accepted records, without pod addresses.
    pub(crate) fn checked(&self) -> &BTreeMap<NodeName, NodeRecord> {
        &self.checked
    }

    pub(crate) fn take_changed(&mut self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.changed)
    }

    /// The durable part of a node or tombstone.
    pub(crate) fn stored(&self, name: &NodeName) -> Option<StoredNode> {
        if let Some(present) = self.present.get(name) {
            let record = self.checked.get(name).cloned();
            // What is stored of the keys is the truth, also where the rules hide a part of it.
            let record = record.map(|record| NodeRecord {
                slots: present.keys.slots.clone(),
                ..record
            });
            return Some(StoredNode {
                name: name.clone(),
                order: present.order,
                record,
                since: present.since.clone(),
                revoked: present.revoked.clone(),
            });
        }
        let past = self.past.get(name)?;
        Some(StoredNode {
            name: name.clone(),
            order: past.order,
            record: past.record.clone(),
            since: past.since.clone(),
            revoked: past.revoked.clone(),
        })
    }

    /// Sentences about what is refused or missing.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut out: Vec<_> = self.refused_nodes.values().cloned().collect();
        out.extend(self.refusals.iter().map(ToString::to_string));
        for (name, present) in &self.present {
            if self.config.prefix_source == PrefixSource::PodCidr && present.source.pod_cidrs.is_empty() {
                out.push(format!(
                    "node {name} has no podCIDRs: set spec.podCIDRs, or prefixSource: podIP for the cluster"
                ));
            }
            if present.source.addresses.is_empty() {
                out.push(format!(
                    "node {name} has no InternalIP address: nobody can reach it"
                ));
            }
        }
        out
    }
}

fn dead_uids(past: &Past) -> impl Iterator<Item = &NodeUid> {
    let living = past.record.as_ref().map(|record| &record.uid);
    past.revoked
        .iter()
        .map(|revoked| &revoked.uid)
        .filter(move |uid| Some(*uid) != living)
}
