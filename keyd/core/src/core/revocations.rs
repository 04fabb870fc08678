//! Keys that are void, and the version of the directory from which on they are in no device.

use std::collections::VecDeque;

use warren_model::{NodeName, NodeUid, PublicKey};

/// So many are remembered to be shown; void they are for ever, by the tombstones.
const SHOWN: usize = 1000;

/// An incarnation of a node that came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Its name.
    pub node: NodeName,
    /// Its UID.
    pub uid: NodeUid,
    /// The keys that it had last.
    pub keys: Vec<PublicKey>,
    /// The first version of this term without the keys; 0 before it is published.
    pub version: u64,
}

/// The newest of them.
#[derive(Debug, Default)]
pub(super) struct Revocations(VecDeque<Revocation>);

impl Revocations {
    pub(super) fn add(&mut self, revocation: Revocation) {
        self.0.push_front(revocation);
        self.0.truncate(SHOWN);
    }

    /// What was published now has none of their keys.
    pub(super) fn published(&mut self, version: u64) {
        self.0
            .iter_mut()
            .take_while(|revocation| revocation.version == 0)
            .for_each(|revocation| revocation.version = version);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Revocation> {
        self.0.iter()
    }
}
