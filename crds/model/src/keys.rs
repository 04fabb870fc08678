//! The keys of a node, and which slot belongs to which of them.
//!
//! A device has one private key, and a prefix belongs to one peer of a device. So each pair of generations of two nodes
//! has devices of its own, and which ones follows from the two generations alone: a node's slot is
//! `2 * half(own generation) + half(peer's generation)`. Why it is so: `rotation` in keyd's core.

use std::{collections::BTreeSet, net::Ipv6Addr};

use crate::{
    key::{PskId, PublicKey},
    node::{NodeName, NodeUid, SlotKey},
};

/// Slots of a node: two for each of two generations.
pub const KEY_SLOTS: u8 = 4;

/// No generation is higher: JSON numbers are exact up to here, and whoever starts near the end of the range must not make
/// anybody count beyond it. A new key every second would last 285 million years.
pub const MAX_GENERATION: u64 = (1 << 53) - 1;

/// The half of the slots that a generation (from 1) has: 0 or 1.
pub fn half(generation: u64) -> u8 {
    u8::from(generation.is_multiple_of(2))
}

/// The slot of a node's own for a pair, by the generations of its own key and of the peer's.
pub fn slot_of(own: u64, peer: u64) -> u8 {
    2 * half(own) + half(peer)
}

/// The two slots that a generation fills.
pub fn slots_of(generation: u64) -> [u8; 2] {
    let first = 2 * half(generation);
    [first, first + 1]
}

/// The keys of one incarnation of a node. Written by compare-and-swap, published after it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeKeys {
    /// UID of the node.
    pub uid: NodeUid,
    /// What is published, sorted by slot. Empty before the first key.
    pub slots: Vec<SlotKey>,
    /// The generation that is sent with; 0 before the first key. Never goes back.
    pub active: u64,
    /// The highest generation ever accepted. One that is not above it and not listed is void for ever.
    pub last: u64,
}

impl NodeKeys {
    /// A node without a key.
    pub fn none(uid: NodeUid) -> Self {
        Self {
            uid,
            slots: vec![],
            active: 0,
            last: 0,
        }
    }

    /// Whether a generation is published.
    pub fn lists(&self, generation: u64) -> bool {
        self.slots.iter().any(|slot| slot.generation == generation)
    }

    /// The published generations.
    pub fn generations(&self) -> BTreeSet<u64> {
        self.slots.iter().map(|slot| slot.generation).collect()
    }

    /// The published generation that is not active yet.
    pub fn candidate(&self) -> Option<u64> {
        self.slots
            .iter()
            .map(|slot| slot.generation)
            .find(|g| *g > self.active)
    }

    /// The published generation that is not active any more.
    pub fn former(&self) -> Option<u64> {
        self.slots
            .iter()
            .map(|slot| slot.generation)
            .find(|g| *g < self.active)
    }

    /// The key of a generation.
    pub fn key(&self, generation: u64) -> Option<PublicKey> {
        self.slots
            .iter()
            .find(|slot| slot.generation == generation)
            .map(|slot| slot.public_key)
    }

    /// Whether the holder of a published generation's key agrees on pre-shared keys.
    pub fn agrees(&self, generation: u64) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.generation == generation && slot.pre_shared_keys)
    }

    /// The key of a generation in one slot.
    pub fn at(&self, slot: u8, generation: u64) -> Option<&SlotKey> {
        self.slots
            .iter()
            .find(|key| key.slot == slot && key.generation == generation)
    }

    /// The generation of the next key: above all that were, in the half that the active one does not have.
    pub fn next(&self) -> u64 {
        self.above_last(|g| half(g) != half(self.active))
    }

    /// The generation of a key that takes the place of the active one, which is lost.
    pub fn replacement(&self) -> u64 {
        self.above_last(|g| half(g) == half(self.active))
    }

    fn above_last(&self, fits: impl Fn(u64) -> bool) -> u64 {
        let first = self.last + 1;
        if self.active == 0 || fits(first) {
            first
        } else {
            first + 1
        }
    }

    /// The keys with a proved new one beside the active one. `lost`: in place of the active one, whose private half
    /// no longer exists. The sentence says why it is refused.
    pub fn admit(&self, proved: &[SlotKey], lost: bool) -> Result<Self, String> {
        let [first, second] = proved else {
            return Err("a key is offered with its two slots".to_owned());
        };
        let generation = first.generation;
        if generation > MAX_GENERATION {
            return Err(format!(
                "key generation {generation} is beyond {MAX_GENERATION}, the last one"
            ));
        }
        let key = |slot: &SlotKey| (slot.generation, slot.public_key, slot.pre_shared_keys);
        if key(first) != key(second) || [first.slot, second.slot] != slots_of(generation) {
            return Err(format!(
                "key generation {generation} belongs in slots {:?}, one key in both",
                slots_of(generation)
            ));
        }
        if self.key(generation) == Some(first.public_key) {
            return Ok(self.clone());
        }
        let expected = match (self.active, lost) {
            (0, _) => generation.max(self.last + 1),
            (_, true) => self.replacement(),
            (_, false) => self.next(),
        };
        if generation != expected || (self.candidate().is_some() && !lost) {
            return Err(format!(
                "key generation {generation} was not asked for, the next is {expected}"
            ));
        }
        let mut keys = self.clone();
        keys.slots
            .retain(|slot| half(slot.generation) != half(generation));
        keys.slots.extend([first.clone(), second.clone()]);
        keys.slots.sort_by_key(|slot| slot.slot);
        keys.last = generation;
        if self.active == 0 || lost {
            keys.active = generation;
        }
        Ok(keys)
    }

    /// The candidate becomes active: the point of no return.
    pub fn commit(&self) -> Self {
        Self {
            active: self.candidate().unwrap_or(self.active),
            ..self.clone()
        }
    }

    /// Everything but the active generation leaves: a candidate is withdrawn, a former one retired.
    pub fn only_active(&self) -> Self {
        let mut keys = self.clone();
        keys.slots.retain(|slot| slot.generation == self.active);
        keys
    }
}

/// A path of a pair as one end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathState {
    /// Generation of the reporting node's key.
    pub own: u64,
    /// Generation of the peer's key.
    pub peer: u64,
    /// Everything is in place to receive, and the last handshake is fresh.
    pub verified: bool,
    /// Packets to the peer take this path: what the path map says, not what is wanted.
    pub sending: bool,
    /// On its way out, and nothing has arrived on it for a while.
    pub quiet: bool,
    /// The ends have different pre-shared keys of it: it cannot carry anything until both have forgotten theirs.
    pub conflict: Option<PskConflict>,
}

/// The pre-shared keys that the ends of a path have; `None` for none. They differ: one end has lost something (its disk was
/// set back).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PskConflict {
    /// The reporting node's.
    pub own: Option<PskId>,
    /// The peer's, as it said inside the tunnel.
    pub peer: Option<PskId>,
}

/// `keyd`'s word that a pre-shared key is to be forgotten, so that both ends agree on another one. No other key than this
/// is meant: late or repeated, it does no harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForgetPsk {
    /// The node at the other end.
    pub peer: NodeName,
    /// Generation of the key of the node that is told.
    pub own: u64,
    /// Generation of the peer's key.
    pub other: u64,
    /// The key.
    pub id: PskId,
}

/// The link-local address of a device, which follows from its key: `fe80::` and the first 64 bits of that. Only the
/// exchange of pre-shared keys has to do with it.
pub fn link_address(key: &PublicKey) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..].copy_from_slice(&key.as_bytes()[..8]);
    octets.into()
}

/// All paths to one peer; replaces what was reported of that peer before. Without paths: the peer is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairReport {
    /// The peer.
    pub peer: NodeName,
    /// Its UID, as the reporting agent knows it.
    pub uid: NodeUid,
    /// The paths.
    pub paths: Vec<PathState>,
}
