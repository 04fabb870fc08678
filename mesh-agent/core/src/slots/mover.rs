//! The last look before a pair moves to another path.

use std::collections::BTreeMap;

use warren_model::{NodeName, PublicKey};

use super::path::Path;

/// Remembers since when a path has been the one to move to.
///
/// A fresh handshake proves what was up to three minutes ago, and what `keyd` knows of the other end is as old as the
/// last word on its stream. Had the peer rebooted in between, its sessions would be gone, while this end would not
/// notice. So a path is ready only after something has arrived on it since it became the one to move to; its short
/// keepalive makes that a matter of a second.
#[derive(Debug, Default)]
pub struct Mover {
    waiting: BTreeMap<NodeName, (PublicKey, PublicKey, u64)>,
}

impl Mover {
    /// Whether the peer has been heard on `target` since this was first asked. `own_key` is this node's key on it,
    /// `received` what its device has received from the peer, in bytes.
    pub fn is_heard(&mut self, peer: &NodeName, own_key: PublicKey, target: &Path, received: u64) -> bool {
        match self.waiting.get_mut(peer) {
            Some((own, key, before)) if (*own, *key) == (own_key, target.key) => {
                // A device that was emptied counts from 0.
                *before = received.min(*before);
                received > *before
            }
            _ => {
                self.waiting.insert(peer.clone(), (own_key, target.key, received));
                false
            }
        }
    }

    /// The pair has moved, or the peer is gone.
    pub fn forget(&mut self, peer: &NodeName) {
        self.waiting.remove(peer);
    }

    /// Whether a pair is about to move: look again before long.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}
