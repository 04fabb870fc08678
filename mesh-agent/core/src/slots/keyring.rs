//! Which private keys a node has, makes and destroys. Generations only: the keys themselves live in the binary.

use std::collections::BTreeSet;

use super::path::NodeKeys;

/// The generations of the private keys that are on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keyring {
    held: BTreeSet<u64>,
}

impl Keyring {
    /// What was found at the start.
    pub fn new(held: impl IntoIterator<Item = u64>) -> Self {
        Self {
            held: held.into_iter().collect(),
        }
    }

    /// Whether a private key is there.
    pub fn holds(&self, generation: u64) -> bool {
        self.held.contains(&generation)
    }

    /// All generations, as `keyd` is told them.
    pub fn held(&self) -> &BTreeSet<u64> {
        &self.held
    }

    /// `keyd` asks for a key. Returns whether one must be made; one that is there is offered again.
    pub fn must_make(&self, generation: u64) -> bool {
        !self.holds(generation)
    }

    /// The first key of a node without any, where the directory (if one is known) has none of it either. With a key in
    /// the directory and none on disk, `keyd` asks for what it needs.
    pub fn first(&self, own: Option<&NodeKeys>) -> Option<u64> {
        match own {
            _ if !self.held.is_empty() => None,
            Some(own) if own.active > 0 => None,
            own => Some(own.map_or(0, |own| own.last) + 1),
        }
    }

    /// A key is on disk, synced.
    pub fn add(&mut self, generation: u64) {
        self.held.insert(generation);
    }

    /// A key was destroyed: device emptied, memory overwritten, file removed.
    pub fn remove(&mut self, generation: u64) {
        self.held.remove(&generation);
    }

    /// Generations to destroy. That the directory does not list one proves nothing by itself: it may be that of a
    /// leader which has not seen the key yet.
    pub fn void(&self, own: &NodeKeys) -> Vec<u64> {
        let is_void = |generation: &u64| {
            !own.lists(*generation) && (*generation < own.active || *generation <= own.last)
        };
        self.held.iter().copied().filter(is_void).collect()
    }
}
