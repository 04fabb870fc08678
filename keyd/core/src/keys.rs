//! Which node owns which public key, and which keys never come back.

use std::collections::HashMap;

use warren_model::{NodeName, PublicKey};

/// The registry. A key has one owner from its first proof until it is revoked; a revoked one has none for ever.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    owners: HashMap<PublicKey, NodeName>,
    revoked: HashMap<PublicKey, NodeName>,
}

impl Keys {
    /// Claims a proved key for a node, or says in one sentence why not.
    pub(crate) fn claim(&mut self, key: PublicKey, node: &NodeName) -> Result<(), String> {
        if let Some(former) = self.revoked.get(&key) {
            return Err(format!(
                "public key {key} was revoked (it belonged to node {former}): make a new key"
            ));
        }
        let owner = self.owners.entry(key).or_insert_with(|| node.clone());
        if owner != node {
            return Err(format!(
                "public key {key} already belongs to node {owner}: make a new key"
            ));
        }
        Ok(())
    }

    /// Revokes a key for ever.
    pub(crate) fn revoke(&mut self, key: PublicKey, node: &NodeName) {
        self.owners.remove(&key);
        self.revoked.entry(key).or_insert_with(|| node.clone());
    }
}
