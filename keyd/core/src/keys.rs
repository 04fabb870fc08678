//! Which node owns which public key, and which keys never come back.

use std::collections::HashMap;

use warren_model::{NodeName, NodeUid, PublicKey};

/// The registry. A key has one owner from its first proof until it is revoked; a revoked one has none for ever.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    owners: HashMap<PublicKey, NodeName>,
    revoked: HashMap<PublicKey, (NodeName, NodeUid)>,
}

impl Keys {
    /// Whether a node may have a key, or in one sentence why not.
    pub(crate) fn may_claim(&self, key: PublicKey, node: &NodeName) -> Result<(), String> {
        if let Some((former, _)) = self.revoked.get(&key) {
            return Err(format!(
                "public key {key} was revoked (it belonged to node {former}): make a new key"
            ));
        }
        match self.owners.get(&key) {
            Some(owner) if owner != node => Err(format!(
                "public key {key} already belongs to node {owner}: make a new key"
            )),
            _ => Ok(()),
        }
    }

    /// The owner of a key, if it is another node.
    pub(crate) fn other_owner(&self, key: PublicKey, node: &NodeName) -> Option<NodeName> {
        self.owners.get(&key).filter(|owner| *owner != node).cloned()
    }

    /// Claims a proved key for a node, or says in one sentence why not.
    pub(crate) fn claim(&mut self, key: PublicKey, node: &NodeName) -> Result<(), String> {
        self.may_claim(key, node)?;
        self.owners.insert(key, node.clone());
        Ok(())
    }

    /// Whether a key is this node's, or nobody's, or one that this very incarnation of the node had before.
    pub(crate) fn may_hold(&self, key: PublicKey, node: &NodeName, uid: &NodeUid) -> bool {
        match self.revoked.get(&key) {
            Some((_, former)) => former == uid,
            None => self.may_claim(key, node).is_ok(),
        }
    }

    /// Revokes a key of an incarnation of a node for ever.
    pub(crate) fn revoke(&mut self, key: PublicKey, node: &NodeName, uid: &NodeUid) {
        self.owners.remove(&key);
        self.revoked
            .entry(key)
            .or_insert_with(|| (node.clone(), uid.clone()));
    }
}
