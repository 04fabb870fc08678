//! The paths of a pair.

use std::{collections::BTreeSet, time::Duration};

use ipnet::IpNet;
pub use warren_model::keys::{KEY_SLOTS, NodeKeys, half, slot_of};
use warren_model::{PublicKey, SlotKey};

use super::keyring::Keyring;
use crate::{
    psk::PskUse,
    state::{NodePath, State},
};

/// Whether `offered` may take the place of `known`: `active` and `last` of an incarnation never go back, so a record
/// that would set them back comes from a leader that has not seen the newest.
pub fn newer(known: &NodeKeys, offered: &NodeKeys) -> bool {
    known.uid != offered.uid || (offered.active, offered.last) >= (known.active, known.last)
}

/// A way between this node and a peer: one device at either end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// This node's slot.
    pub slot: u8,
    /// Generation of this node's key on it.
    pub own: u64,
    /// Generation of the peer's key.
    pub peer: u64,
    /// The peer's key.
    pub key: PublicKey,
    /// The peer's UDP port.
    pub port: u16,
    /// The path has a pre-shared key: the peer's UDP port where it is agreed on. `None`: it has none.
    pub exchange: Option<u16>,
}

impl Path {
    /// This node's slot where a pre-shared key is agreed on: the other one of the same half, which has the same key.
    pub fn exchange_slot(&self) -> u8 {
        self.slot ^ 1
    }
}

/// All paths of a pair that this node can use, sorted by slot: for each published generation of its own whose private
/// key it holds, and each of the peer's. No two have the same slot, at either end.
pub fn paths(own: &NodeKeys, keyring: &Keyring, peer: &NodeKeys) -> Vec<Path> {
    let mut found = Vec::with_capacity(2);
    for here in &own.slots {
        if half(here.generation) != here.slot / 2 || !keyring.holds(own, here.generation) {
            continue;
        }
        let there = |there: &&SlotKey| {
            there.slot == slot_of(there.generation, here.generation)
                && here.slot == slot_of(here.generation, there.generation)
        };
        // A half belongs to one generation, so there is one at most.
        if let Some(there) = peer.slots.iter().find(there) {
            let shared = here.pre_shared_keys && there.pre_shared_keys;
            let sibling = own.at(here.slot ^ 1, here.generation);
            let exchange = sibling.and(peer.at(there.slot ^ 1, there.generation));
            let exchange = exchange.filter(|_| shared).map(|there| there.port);
            // Never without it: then a part of what the directory says of a node was refused.
            if shared && exchange.is_none() {
                continue;
            }
            found.push(Path {
                slot: here.slot,
                own: here.generation,
                peer: there.generation,
                key: there.public_key,
                port: there.port,
                exchange,
            });
        }
    }
    found
}

/// The generation of the key that each device should have; `None` for one that is emptied. A device is open while a
/// path needs it; the first one of the active generation always is.
pub fn devices<'a>(
    own: &NodeKeys,
    keyring: &Keyring,
    paths: impl IntoIterator<Item = &'a Path>,
) -> [Option<u64>; KEY_SLOTS as usize] {
    let mut open = [None; KEY_SLOTS as usize];
    let home = slot_of(own.active, own.active) & 2;
    if own.active > 0 && own.at(home, own.active).is_some() && keyring.holds(own, own.active) {
        open[usize::from(home)] = Some(own.active);
    }
    for path in paths {
        open[usize::from(path.slot)] = Some(path.own);
        if path.exchange.is_some() {
            open[usize::from(path.exchange_slot())] = Some(path.own);
        }
    }
    open
}

/// The slot that sends to a peer, of those that its `paths` use. `current` is what the path map says now; `ready` has a
/// bit for each slot whose path this node has verified and by which the peer has been heard ([`super::Mover`]).
///
/// Moves to the path of the two active generations once that is ready, and never from it: having moved is a promise,
/// on which `keyd` retires the old key.
pub fn sending(
    own: &NodeKeys,
    peer: &NodeKeys,
    paths: &[Path],
    current: Option<u8>,
    ready: u8,
) -> Option<u8> {
    let has = |slot: &u8| paths.iter().any(|path| path.slot == *slot);
    let bit = |slot: u8| ready & (1 << slot) != 0;
    let current = current.filter(has);
    let active = target(own, peer, paths).map(|path| path.slot);
    match (current, active) {
        (Some(current), Some(active)) if current != active && !bit(active) => Some(current),
        (_, Some(active)) => Some(active),
        (Some(current), None) => Some(current),
        // The active key is not there (lost): what else carries?
        (None, None) => paths
            .iter()
            .map(|path| path.slot)
            .find(|slot| bit(*slot))
            .or_else(|| paths.first().map(|path| path.slot)),
    }
}

/// The entry of the path map: sends by one slot, receives on all.
pub fn node_path(paths: &[Path], sending: Option<u8>) -> Option<NodePath> {
    let receive = paths.iter().fold(0, |bits, path| bits | 1 << path.slot);
    sending.map(|slot| NodePath { slot, receive })
}

/// The path of the two active generations.
pub fn target<'a>(own: &NodeKeys, peer: &NodeKeys, paths: &'a [Path]) -> Option<&'a Path> {
    paths
        .iter()
        .find(|path| (path.own, path.peer) == (own.active, peer.active))
}

/// Whether this node begins the handshake of a path. Were both ends to begin at once, each would keep the session that
/// it began, and WireGuard would drop the one that the other still sends with at the next rekey.
pub fn begins(own_key: PublicKey, peer_key: PublicKey) -> bool {
    own_key < peer_key
}

/// How long the other end leaves the beginning to the one that [`begins`].
pub const YIELD: Duration = Duration::from_secs(3);

/// Persistent keepalive of a path in seconds; `usual` where nothing rotates. A path on its way out has none, so that
/// what still arrives on it is data. One that is about to be used, or has just come into use, has a short one: it
/// begins the handshake, and shows each end that the other is there. `may_begin`: this node [`begins`], or there is
/// a session already, or it has waited for [`YIELD`].
pub fn keepalive(
    own: &NodeKeys,
    peer: &NodeKeys,
    paths: &[Path],
    path: &Path,
    may_begin: bool,
    usual: u16,
) -> u16 {
    let settled = (path.own, path.peer) == (own.active, peer.active)
        && !paths.iter().any(|other| is_draining(own, peer, other));
    match is_draining(own, peer, path) || !may_begin {
        true => 0,
        false if settled => usual,
        false => 1,
    }
}

/// Whether a path is on its way out.
pub fn is_draining(own: &NodeKeys, peer: &NodeKeys, path: &Path) -> bool {
    path.own < own.active || path.peer < peer.active
}

/// Whether a path is in place at this end, down to its prefixes, its pre-shared key and its receive bit, and its handshake
/// is fresh. A peer gets its pre-shared key when it is added, so that no handshake is older than that. `index` is
/// the node index of the peer, `own_key` this node's public key of the path's generation.
pub fn is_verified(
    state: &State,
    index: u16,
    path: &Path,
    own_key: PublicKey,
    psk: PskUse,
    prefixes: &BTreeSet<IpNet>,
) -> bool {
    let wanted = match psk {
        PskUse::Without => None,
        PskUse::Awaited => return false,
        PskUse::With(id) => Some(id),
    };
    let receives = |entry: &NodePath| entry.receive & (1 << path.slot) != 0;
    state.devices.get(&path.slot).is_some_and(|device| {
        device.exists
            && device.up
            && device.programs
            && device.wireguard.public_key == Some(own_key)
            && device.wireguard.peers.get(&path.key).is_some_and(|peer| {
                !peer.silent && peer.pre_shared == wanted && peer.allowed_ips.is_superset(prefixes)
            })
    }) && state.paths.get(&index).is_some_and(receives)
}
