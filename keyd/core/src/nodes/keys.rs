//! The keys of nodes: which may be had, and what is stored of them.

use std::collections::BTreeMap;

use warren_model::{NodeKeys, NodeName, NodeUid, PublicKey};

use super::{KEY_WINDOW_MS, KEYS_PER_WINDOW, Nodes, REPLACED_KEYS};
use crate::stored::{Revoked, StoredNode};

impl Nodes {
    /// The keys of a node that exists, as they are stored.
    pub(crate) fn keys(&self, name: &NodeName) -> Option<&NodeKeys> {
        self.present.get(name).map(|present| &present.keys)
    }

    /// All nodes that exist, with when each of their published generations was accepted, Unix seconds.
    pub(crate) fn all_keys(&self) -> impl Iterator<Item = (&NodeName, &NodeKeys, &BTreeMap<u64, u64>)> {
        self.present
            .iter()
            .map(|(name, present)| (name, &present.keys, &present.since))
    }

    /// Labels of the Node.
    pub(crate) fn labels(&self, name: &NodeName) -> Option<&BTreeMap<String, String>> {
        self.present.get(name).map(|present| &present.source.labels)
    }

    /// Whether a node may have a proved key, or in one sentence why not.
    pub(crate) fn may_have_key(&mut self, name: &NodeName, key: PublicKey, now: u64) -> Result<(), String> {
        let Some(present) = self.present.get_mut(name) else {
            return Err(format!("node {name} does not exist any more"));
        };
        present
            .key_changes
            .retain(|at| now.saturating_sub(*at) < KEY_WINDOW_MS);
        if present.key_changes.len() >= KEYS_PER_WINDOW {
            return Err(format!(
                "node {name} changed its keys {KEYS_PER_WINDOW} times within an hour: wait"
            ));
        }
        self.keys.may_claim(key, name)
    }

    /// A key was accepted and is about to be written: it is nobody else's from now on.
    pub(crate) fn claim_key(&mut self, name: &NodeName, key: PublicKey, now: u64) {
        // It may be had (asked before): nothing came in between.
        let _ = self.keys.claim(key, name);
        if let Some(present) = self.present.get_mut(name) {
            present.key_changes.push(now);
        }
    }

    /// The node that a key belongs to, if it is another than this.
    pub(crate) fn owner_of(&self, key: PublicKey, node: &NodeName) -> Option<NodeName> {
        self.keys.other_owner(key, node)
    }

    /// Whether a key that an agent says it has can be a key of this node.
    pub(crate) fn may_hold(&self, name: &NodeName, key: PublicKey) -> bool {
        let uid = self.uid(name);
        uid.is_some_and(|uid| self.keys.may_hold(key, name, uid))
    }

    /// The durable part of a node with other keys. Those that are left out never come back.
    pub(crate) fn with_keys(
        &self,
        name: &NodeName,
        keys: &NodeKeys,
        unix_seconds: u64,
    ) -> Option<StoredNode> {
        let present = self.present.get(name).filter(|present| present.uid == keys.uid)?;
        let mut stored = self.stored(name)?;
        let record = stored.record.get_or_insert_with(|| self.claimed(name, present));
        record.slots.clone_from(&keys.slots);
        (record.active, record.last) = (keys.active, keys.last);
        for key in public_keys(&present.keys) {
            if !keys.slots.iter().any(|slot| slot.public_key == key) {
                remember_replaced(&mut stored.revoked, &present.uid, key);
            }
        }
        let since = |generation| {
            let known = present.since.get(&generation).copied();
            (generation, known.unwrap_or(unix_seconds))
        };
        stored.since = keys.generations().into_iter().map(since).collect();
        Some(stored)
    }

    /// What is stored of a node now. False where it says nothing of the node that exists, or less than is known: then it was
    /// set back, and it is written anew.
    pub(crate) fn found(&mut self, stored: &StoredNode) -> bool {
        let Some(present) = self.present.get_mut(&stored.name) else {
            return false;
        };
        let Some(record) = stored.record.as_ref().filter(|record| record.uid == present.uid) else {
            return false;
        };
        if (record.active, record.last) < (present.keys.active, present.keys.last) {
            return false;
        }
        for revoked in &stored.revoked {
            for key in &revoked.keys {
                self.keys.revoke(*key, &stored.name, &revoked.uid);
            }
        }
        present.keys = record.keys();
        present.since.clone_from(&stored.since);
        for revoked in &stored.revoked {
            match present.revoked.iter_mut().find(|known| known.uid == revoked.uid) {
                Some(known) => {
                    let new = revoked.keys.iter().filter(|key| !known.keys.contains(key));
                    let new: Vec<_> = new.copied().collect();
                    known.keys.extend(new);
                }
                None => present.revoked.push(revoked.clone()),
            }
        }
        for key in public_keys(&present.keys) {
            // A refused one is not published.
            let _ = self.keys.claim(key, &stored.name);
        }
        self.dirty = true;
        self.changed.insert(stored.name.clone());
        true
    }
}

/// Each key once.
pub(super) fn public_keys(keys: &NodeKeys) -> Vec<PublicKey> {
    keys.generations()
        .into_iter()
        .filter_map(|generation| keys.key(generation))
        .collect()
}

fn remember_replaced(revoked: &mut Vec<Revoked>, uid: &NodeUid, key: PublicKey) {
    let index = match revoked.iter().position(|revoked| revoked.uid == *uid) {
        Some(index) => index,
        None => {
            revoked.push(Revoked {
                uid: uid.clone(),
                keys: vec![],
            });
            revoked.len() - 1
        }
    };
    let keys = &mut revoked[index].keys;
    keys.push(key);
    if keys.len() > REPLACED_KEYS {
        keys.remove(0);
    }
}

#[cfg(test)]
impl Nodes {
    /// As if a node had had too many keys.
    pub(crate) fn exhaust(&mut self, name: &NodeName) {
        if let Some(present) = self.present.get_mut(name) {
            present.key_changes = vec![0; KEYS_PER_WINDOW];
        }
    }
}
