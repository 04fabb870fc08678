//! Nodes as the directory knows them.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    key::PublicKey,
    keys::{KEY_SLOTS, NodeKeys},
};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// The name of a Kubernetes Node (`metadata.name`).
    NodeName
}
name_type! {
    /// The UID of a Node object. A Node that is registered again is another node.
    NodeUid
}

/// What moves a node's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// The kernel's WireGuard.
    Kernel,
    /// The tunnel process behind a TUN device.
    Userspace,
}

impl fmt::Display for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        })
    }
}

/// The number of device slots of a node (`warren0..3`).
pub const SLOTS: u8 = KEY_SLOTS;

/// One WireGuard device of a node: its place, port and key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotKey {
    /// 0 to [`SLOTS`] - 1.
    pub slot: u8,
    /// UDP port of the device.
    pub port: u16,
    /// Of the key; grows with every new key of the node. Starts at 1.
    pub generation: u64,
    /// The device's public key. A key fills both slots of its generation's half ([`crate::keys`]).
    pub public_key: PublicKey,
    /// Whether the holder of this key agrees on pre-shared keys. A path between two such keys always has one, any other
    /// never. Said when the key is offered; never changes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pre_shared_keys: bool,
}

/// What the directory publishes of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    /// Name of the Node object.
    pub name: NodeName,
    /// UID of the Node object.
    pub uid: NodeUid,
    /// Addresses at which the node's WireGuard ports are reached, best first. A subset of `addresses`.
    pub endpoints: Vec<IpAddr>,
    /// All addresses of the node's own (InternalIP), both families.
    pub addresses: Vec<IpAddr>,
    /// Pod prefixes that live on the node: podCIDRs, or single pod addresses with `prefixSource: podIP`.
    pub prefixes: Vec<IpNet>,
    /// Devices, sorted by slot. Empty until the node has proved a key.
    pub slots: Vec<SlotKey>,
    /// The key generation that is sent with; 0 before the first key. Never goes back.
    pub active: u64,
    /// The highest key generation ever accepted. Never goes back.
    pub last: u64,
    /// What moves its packets; `None` until its agent has said so.
    pub datapath: Option<Datapath>,
}

impl NodeRecord {
    /// The keys alone.
    pub fn keys(&self) -> NodeKeys {
        NodeKeys {
            uid: self.uid.clone(),
            slots: self.slots.clone(),
            active: self.active,
            last: self.last,
        }
    }
}
