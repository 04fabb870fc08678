//! Which private keys a node has, makes and destroys. Public halves only: the keys themselves live in the binary.

use std::collections::BTreeMap;

use warren_model::PublicKey;

use super::path::NodeKeys;

/// The private keys that are on disk, by generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keyring {
    held: BTreeMap<u64, PublicKey>,
}

impl Keyring {
    /// What was found at the start.
    pub fn new(held: impl IntoIterator<Item = (u64, PublicKey)>) -> Self {
        Self {
            held: held.into_iter().collect(),
        }
    }

    /// Whether the private key of a published generation is there: this key, not another of the same number that was
    /// made after the disk was replaced.
    pub fn holds(&self, own: &NodeKeys, generation: u64) -> bool {
        let published = own.key(generation);
        published.is_some() && self.held.get(&generation) == published.as_ref()
    }

    /// All keys, as `keyd` is told them.
    pub fn held(&self) -> &BTreeMap<u64, PublicKey> {
        &self.held
    }

    /// `keyd` asks for a key: the first, the next, or one in place of a lost one. Returns whether it must be made; one
    /// that is there is offered again.
    pub fn must_make(&self, generation: u64) -> bool {
        !self.held.contains_key(&generation)
    }

    /// A key is on disk, synced.
    pub fn add(&mut self, generation: u64, key: PublicKey) {
        self.held.insert(generation, key);
    }

    /// A key was destroyed: device emptied, memory overwritten, file removed.
    pub fn remove(&mut self, generation: u64) {
        self.held.remove(&generation);
    }

    /// Generations to destroy: those that were retired or withdrawn, and those that name another key. That the directory
    /// does not list one proves nothing by itself: it may be that of a leader which has not seen the key yet.
    pub fn void(&self, own: &NodeKeys) -> Vec<u64> {
        let is_void = |(generation, key): &(&u64, &PublicKey)| match own.key(**generation) {
            Some(published) => published != **key,
            None => **generation < own.active || **generation <= own.last,
        };
        self.held
            .iter()
            .filter(is_void)
            .map(|(generation, _)| *generation)
            .collect()
    }
}
