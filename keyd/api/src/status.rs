//! The cluster's status as `keyd status -o json` prints it and the command line reads it: [`proto::StatusResponse`]
//! with readable addresses and keys. Pure data; nothing is refused, so that a malformed entry can be shown.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use crate::{
    convert::{address_from_bytes, prefix_from_proto},
    proto,
};

/// What `keyd` knows of the whole cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterStatus {
    /// This `keyd` is the leader; the others know less.
    pub leader: bool,
    /// `host:port` of the leader.
    pub leader_address: String,
    /// Name of this `keyd`.
    pub keyd_id: String,
    /// Version of this `keyd`.
    pub version: String,
    /// The directory's epoch.
    pub epoch: u64,
    /// The directory's version within the epoch.
    pub directory_version: u64,
    /// `kubernetes` or `manifests`.
    pub source: String,
    /// Encryption is on in the cluster's configuration.
    pub encryption: bool,
    /// Number of identities.
    pub identities: u64,
    /// Number of pod addresses.
    pub workloads: u64,
    /// Number of policy objects, valid or not.
    pub policies: u64,
    /// Of them, those that enforce nothing because something is wrong with them.
    pub invalid_policies: u64,
    /// Number of distinct selectors in use.
    pub selectors: u64,
    /// keyd's time, Unix milliseconds: what times here are to be compared with.
    pub now_unix_ms: i64,
    /// Refused entries, malformed objects: a sentence each.
    pub problems: Vec<String>,
    /// The nodes, by name.
    pub nodes: Vec<NodeStatus>,
}

/// One node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// Name of the Node object.
    pub name: String,
    /// UID of the Node object.
    pub uid: String,
    /// Where its WireGuard ports are reached.
    pub endpoints: Vec<String>,
    /// Its own addresses.
    pub addresses: Vec<String>,
    /// Pod prefixes that live on it.
    pub prefixes: Vec<String>,
    /// The keys that the directory publishes for it.
    pub slots: Vec<Slot>,
    /// The key generation that is sent with; 0 before the first key.
    pub active: u64,
    /// `kernel`, `userspace`, or empty where it is not known yet.
    pub datapath: String,
    /// Its agent has a stream to `keyd` now.
    pub connected: bool,
    /// When the agent was last heard of, Unix milliseconds; 0 for never.
    pub last_seen_unix_ms: i64,
    /// The directory that the agent has applied: epoch.
    pub applied_epoch: u64,
    /// The directory that the agent has applied: version.
    pub applied_version: u64,
    /// What the agent reported; `None` until it has.
    pub agent: Option<AgentReport>,
}

/// A WireGuard device and its key.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Slot {
    /// 0 to 2.
    pub slot: u32,
    /// UDP port.
    pub port: u32,
    /// Key generation.
    pub generation: u64,
    /// Public key, base64.
    pub public_key: String,
    /// Its holder agrees on pre-shared keys.
    pub pre_shared_keys: bool,
}

/// What an agent reports of its node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AgentReport {
    /// The device, its key and peers agree with what is wanted, and every program is attached.
    pub encryption: bool,
    /// `kernel`, `userspace`, or empty.
    pub datapath: String,
    /// Name of the main device.
    pub interface: String,
    /// The devices as they are.
    pub slots: Vec<Slot>,
    /// The peers as they are on the devices.
    pub peers: Vec<PeerReport>,
    /// A sentence each; empty where all is well.
    pub problems: Vec<String>,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Pods that the agent manages.
    pub endpoints: u32,
    /// What is not tunnelled, a line each.
    pub exemptions: Vec<String>,
    /// Version of the agent.
    pub agent_version: String,
    /// Epoch that the report is about.
    pub epoch: u64,
    /// Version that the report is about.
    pub version: u64,
}

/// A peer on a device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerReport {
    /// Name of the peer's node.
    pub node: String,
    /// The own slot.
    pub slot: u32,
    /// The own device's public key, base64.
    pub own_public_key: String,
    /// The peer's public key as the device has it, base64.
    pub public_key: String,
    /// `address:port`.
    pub endpoint: String,
    /// When the last handshake was, Unix milliseconds; 0 for never.
    pub last_handshake_unix_ms: i64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// A handshake within the last 180 s.
    pub ready: bool,
    /// The path has a post-quantum pre-shared key.
    pub pre_shared_key: bool,
    /// Why it has none; empty where it has one.
    pub no_pre_shared_key: String,
}

impl From<proto::StatusResponse> for ClusterStatus {
    fn from(status: proto::StatusResponse) -> Self {
        let mut nodes: Vec<NodeStatus> = status.nodes.into_iter().map(NodeStatus::from).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            leader: status.leader,
            leader_address: status.leader_address,
            keyd_id: status.keyd_id,
            version: status.version,
            epoch: status.epoch,
            directory_version: status.directory_version,
            source: status.source,
            encryption: status.encryption,
            identities: status.identities,
            workloads: status.workloads,
            policies: status.policies,
            invalid_policies: status.invalid_policies,
            selectors: status.selectors,
            now_unix_ms: status.now_unix_ms,
            problems: status.problems,
            nodes,
        }
    }
}

impl From<proto::NodeStatus> for NodeStatus {
    fn from(status: proto::NodeStatus) -> Self {
        let node = status.node.unwrap_or_default();
        Self {
            name: node.name,
            uid: node.uid,
            endpoints: node.endpoints.iter().map(|bytes| address(bytes)).collect(),
            addresses: node.addresses.iter().map(|bytes| address(bytes)).collect(),
            prefixes: node.prefixes.iter().map(prefix).collect(),
            slots: node.slots.into_iter().map(Slot::from).collect(),
            active: node.active,
            datapath: datapath(node.datapath),
            connected: status.connected,
            last_seen_unix_ms: status.last_seen_unix_ms,
            applied_epoch: status.applied_epoch,
            applied_version: status.applied_version,
            agent: status.status.map(AgentReport::from),
        }
    }
}

impl From<proto::Slot> for Slot {
    fn from(slot: proto::Slot) -> Self {
        Self {
            slot: slot.slot,
            port: slot.port,
            generation: slot.generation,
            public_key: STANDARD.encode(slot.public_key),
            pre_shared_keys: slot.pre_shared_keys,
        }
    }
}

impl From<proto::AgentStatus> for AgentReport {
    fn from(status: proto::AgentStatus) -> Self {
        Self {
            encryption: status.encryption,
            datapath: datapath(status.datapath),
            interface: status.interface,
            slots: status.slots.into_iter().map(Slot::from).collect(),
            peers: status.peers.into_iter().map(PeerReport::from).collect(),
            problems: status.problems,
            drops: status.drops.into_iter().collect(),
            endpoints: status.endpoints,
            exemptions: status.exemptions,
            agent_version: status.agent_version,
            epoch: status.epoch,
            version: status.version,
        }
    }
}

impl From<proto::PeerStatus> for PeerReport {
    fn from(peer: proto::PeerStatus) -> Self {
        Self {
            node: peer.node,
            slot: peer.slot,
            own_public_key: STANDARD.encode(peer.own_public_key),
            public_key: STANDARD.encode(peer.public_key),
            endpoint: peer.endpoint,
            last_handshake_unix_ms: peer.last_handshake_unix_ms,
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
            ready: peer.ready,
            pre_shared_key: peer.pre_shared_key,
            no_pre_shared_key: peer.no_pre_shared_key,
        }
    }
}

fn address(bytes: &[u8]) -> String {
    address_from_bytes(bytes).map_or_else(
        |_| format!("malformed:{}", hex::encode(bytes)),
        |ip| ip.to_string(),
    )
}

fn prefix(prefix: &proto::Prefix) -> String {
    prefix_from_proto(prefix).map_or_else(
        |_| format!("{}/{}", address(&prefix.address), prefix.length),
        |net| net.to_string(),
    )
}

fn datapath(value: i32) -> String {
    match proto::Datapath::try_from(value) {
        Ok(proto::Datapath::Kernel) => "kernel".into(),
        Ok(proto::Datapath::Userspace) => "userspace".into(),
        Ok(proto::Datapath::Unspecified) => String::new(),
        Err(_) => format!("unknown ({value})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_prints() {
        let response = proto::StatusResponse {
            leader: true,
            encryption: true,
            nodes: vec![
                proto::NodeStatus {
                    node: Some(proto::NodeEntry {
                        name: "b".into(),
                        endpoints: vec![vec![192, 0, 2, 1], vec![1, 2]],
                        prefixes: vec![proto::Prefix {
                            address: vec![10, 1, 0, 0],
                            length: 24,
                        }],
                        slots: vec![proto::Slot {
                            public_key: vec![1; 32],
                            ..Default::default()
                        }],
                        datapath: proto::Datapath::Userspace.into(),
                        ..Default::default()
                    }),
                    status: Some(proto::AgentStatus {
                        drops: [("no-path".to_owned(), 3)].into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                },
                proto::NodeStatus {
                    node: Some(proto::NodeEntry {
                        name: "a".into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                },
            ],
            ..Default::default()
        };
        let status = ClusterStatus::from(response);
        assert_eq!(status.nodes[0].name, "a");
        assert_eq!(status.nodes[1].endpoints, ["192.0.2.1", "malformed:0102"]);
        assert_eq!(status.nodes[1].prefixes, ["10.1.0.0/24"]);
        assert_eq!(status.nodes[1].datapath, "userspace");
        let text = serde_json::to_string(&status).expect("JSON");
        assert_eq!(
            serde_json::from_str::<ClusterStatus>(&text).expect("the same"),
            status
        );
    }
}
