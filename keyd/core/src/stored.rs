//! Durable state: what is written before it is published, and read back at the start of a term.

use std::net::IpAddr;

use warren_model::{IdentityId, Labels, NodeName, NodeRecord, NodeUid, PodRef, PublicKey};

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
    /// Keys that never come back.
    pub revoked: Vec<Revoked>,
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

/// An object to write. Writing the same twice is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// Create or replace a node.
    Node(StoredNode),
    /// Create or replace an identity.
    Identity(IdentityId, Labels),
    /// Delete an identity.
    IdentityDelete(IdentityId),
    /// Create or replace an endpoint.
    Endpoint(StoredEndpoint),
    /// Delete an endpoint.
    EndpointDelete(PodRef),
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
}
