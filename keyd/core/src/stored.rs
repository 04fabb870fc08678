//! Durable state: what is written before it is published, and read back at the start of a term.

use std::{collections::BTreeMap, net::IpAddr};

use warren_model::{IdentityId, Labels, NodeKeys, NodeName, NodeRecord, NodeUid, PodRef, PublicKey};

use crate::rotation::Progress;

/// Keys of a former incarnation of a node, or replaced ones: they never come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// UID of the node that held them.
    pub uid: NodeUid,
    /// The keys.
    pub keys: Vec<PublicKey>,
}

/// The durable part of a node (`MeshNode`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredNode {
    /// Name of the node.
    pub name: NodeName,
    /// Order of ownership: lower came first. Never reused.
    pub order: u64,
    /// What is published; without pod addresses of `prefixSource: podIP`. `None` for a tombstone.
    pub record: Option<NodeRecord>,
    /// When each published key generation was accepted, Unix seconds.
    pub since: BTreeMap<u64, u64>,
    /// Keys that never come back.
    pub revoked: Vec<Revoked>,
}

impl StoredNode {
    /// What to write where this is wanted ([`Object::Node`]) and `current` is stored, by whomever; `None`: nothing, as the
    /// stored object says that this incarnation is dead.
    ///
    /// Keys change by [`Self::in_place_of`] alone: those that are stored stay, unless they are older, which means that
    /// somebody has set the object back. A key that was stored once and is not any more is revoked.
    pub fn over(&self, current: Option<&Self>) -> Option<Self> {
        let mut out = self.clone();
        let Some(current) = current else {
            return Some(out);
        };
        if let Some(wanted) = &mut out.record
            && current.record.as_ref().map(|record| &record.uid) != Some(&wanted.uid)
            && current.revoked.iter().any(|revoked| revoked.uid == wanted.uid)
        {
            return None;
        }
        out.revoke(&current.revoked);
        let Some(record) = &current.record else {
            return Some(out);
        };
        match &mut out.record {
            Some(wanted) if wanted.uid == record.uid => {
                if (record.active, record.last) >= (wanted.active, wanted.last) {
                    wanted.slots.clone_from(&record.slots);
                    (wanted.active, wanted.last) = (record.active, record.last);
                    out.since.clone_from(&current.since);
                }
            }
            // Another incarnation: it is dead where this says so, or where the whole node is.
            wanted => {
                let dead = wanted.is_none() || out.revoked.iter().any(|revoked| revoked.uid == record.uid);
                if dead {
                    let keys = record.slots.iter().map(|slot| slot.public_key).collect();
                    let uid = record.uid.clone();
                    out.revoke(&[Revoked { uid, keys }]);
                }
            }
        }
        Some(out)
    }

    /// What to write where this has changed keys and `current` is stored: nothing, unless the keys there are those that were
    /// changed. An object that is lost, or is not ours, counts as those.
    pub fn in_place_of(&self, was: &NodeKeys, current: Option<&Self>) -> Option<Self> {
        let mut out = self.clone();
        let Some(current) = current else {
            return Some(out);
        };
        if current.record.as_ref().map(NodeRecord::keys).as_ref() != Some(was) {
            return None;
        }
        out.revoke(&current.revoked);
        Some(out)
    }

    fn revoke(&mut self, more: &[Revoked]) {
        for Revoked { uid, keys } in more {
            let index = match self.revoked.iter().position(|revoked| revoked.uid == *uid) {
                Some(index) => index,
                None => {
                    let (uid, keys) = (uid.clone(), vec![]);
                    self.revoked.push(Revoked { uid, keys });
                    self.revoked.len() - 1
                }
            };
            for key in keys {
                if !self.revoked[index].keys.contains(key) {
                    self.revoked[index].keys.push(*key);
                }
            }
        }
    }
}

/// An endpoint that an agent reported (stand-alone mode, where nothing else knows pod addresses).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEndpoint {
    /// The node that reported it.
    pub node: NodeName,
    /// The pod.
    pub pod: PodRef,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// The progress of a rotation as it was written last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRotation {
    /// Name of the KeyRotation.
    pub name: String,
    /// Its UID: another one of the same name begins from the start.
    pub uid: String,
    /// How far it was.
    pub progress: Progress,
}

/// An object to write. Writing the same twice is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// Create or replace a node, all but its keys: where the stored object of the same node has others, that are not older,
    /// they stay. Keys are written by [`Output::WriteKeys`](crate::Output::WriteKeys) alone.
    Node(StoredNode),
    /// Create or replace an identity.
    Identity(IdentityId, Labels),
    /// Delete an identity.
    IdentityDelete(IdentityId),
    /// Create or replace an endpoint.
    Endpoint(StoredEndpoint),
    /// Delete an endpoint.
    EndpointDelete(PodRef),
    /// Forget the progress of a rotation that is gone.
    RotationDelete(String),
}

/// What was read back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// All nodes and tombstones.
    pub nodes: Vec<StoredNode>,
    /// All identities.
    pub identities: Vec<(IdentityId, Labels)>,
    /// All endpoints (stand-alone mode).
    pub endpoints: Vec<StoredEndpoint>,
    /// All rotations.
    pub rotations: Vec<StoredRotation>,
}
