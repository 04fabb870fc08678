//! `MeshNode`: what the directory knows of a node.

#![expect(
    unreachable_pub,
    reason = "the schema derive repeats the struct in an inner scope"
)]
#![expect(
    clippy::duplicated_attributes,
    reason = "the parameters of the printed columns have the same names"
)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use warren_model::{Datapath, NodeRecord, PublicKey, SlotKey};

/// One node, named after its Node object.
///
/// The object of a deleted node stays as a tombstone (`retired`), without owner reference: its keys never come back.
#[derive(CustomResource, KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "warren.dev",
    version = "v1alpha1",
    kind = "MeshNode",
    plural = "meshnodes",
    shortname = "mn",
    status = "MeshNodeStatus",
    doc = "A node of the mesh: its addresses, prefixes and WireGuard keys. Written by keyd alone.",
    derive = "PartialEq",
    printcolumn(name = "Ready", type_ = "boolean", json_path = ".status.ready"),
    printcolumn(name = "Datapath", type_ = "string", json_path = ".spec.datapath"),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".spec.endpoints[0]"),
    printcolumn(
        name = "Prefixes",
        type_ = "string",
        json_path = ".spec.prefixes",
        priority = 1
    ),
    printcolumn(name = "Generation", type_ = "integer", json_path = ".spec.active"),
    printcolumn(
        name = "Retired",
        type_ = "boolean",
        json_path = ".spec.retired",
        priority = 1
    ),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.agentVersion",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.retired) || !self.retired || !has(self.slots) || size(self.slots) == 0", "a retired node holds no keys"))]
pub struct MeshNodeSpec {
    /// UID of the Node object.
    #[serde(rename = "nodeUID")]
    #[schemars(length(max = 256))]
    pub node_uid: String,
    /// Order of ownership among nodes: the lower one came first.
    pub order: u64,
    /// Addresses at which the WireGuard ports are reached, best first.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub endpoints: Vec<String>,
    /// All addresses of the node (InternalIP).
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub addresses: Vec<String>,
    /// podCIDRs. With `prefixSource: podIP` single pod addresses are published but not stored here.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub prefixes: Vec<String>,
    /// WireGuard devices of the node with their proved keys.
    #[serde(default)]
    #[schemars(length(max = 4))]
    #[x_kube(validation = ("self.all(a, self.exists_one(b, a.slot == b.slot))", "a slot is listed once"))]
    pub slots: Vec<SlotSpec>,
    /// The key generation that others send with; 0 before the first key. Never goes back.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub active: u64,
    /// The highest key generation ever accepted. Never goes back.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub last: u64,
    /// What moves the node's packets: `kernel` or `userspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = ("self in ['kernel', 'userspace']", "datapath is kernel or userspace"))]
    pub datapath: Option<String>,
    /// The Node is gone; only the revoked keys matter.
    #[serde(default)]
    pub retired: bool,
    /// Keys that never come back, by the UID of the node that held them.
    #[serde(default)]
    pub revoked: Vec<RevokedKeys>,
    /// keyd's ed25519 signature over name and spec, base64. Objects without a right one are not believed.
    #[serde(default)]
    #[schemars(length(max = 128))]
    pub signature: String,
}

/// A device with its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SlotSpec {
    /// 0 to 3: a key fills both slots of its generation's half.
    #[schemars(range(max = 3))]
    pub slot: u8,
    /// UDP port.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// Key generation, from 1.
    #[schemars(range(min = 1))]
    pub generation: u64,
    /// Base64, 44 characters.
    #[schemars(length(min = 44, max = 44))]
    pub public_key: String,
    /// The holder of the key agrees on pre-shared keys: a path between two such keys always has one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pre_shared_keys: bool,
    /// When keyd accepted the key, Unix seconds; 0: not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub since: u64,
}

/// Keys of a former incarnation, or replaced ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevokedKeys {
    /// UID of the node that held them.
    #[serde(rename = "nodeUID")]
    pub node_uid: String,
    /// The public keys, base64.
    #[serde(default)]
    pub public_keys: Vec<String>,
}

/// What keyd last saw of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeStatus {
    /// The agent is connected, has applied the directory and reports no problem.
    #[serde(default)]
    pub ready: bool,
    /// Version of the agent.
    #[serde(default)]
    pub agent_version: String,
    /// `Connected`, `Ready`.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Who has removed the keys of this node, where it is gone or revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocation: Option<RevocationStatus>,
}

/// Who has removed the keys of a node that is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevocationStatus {
    /// UID of the node that had the keys.
    #[serde(rename = "nodeUID")]
    pub node_uid: String,
    /// All agents have.
    #[serde(default)]
    pub complete: bool,
    /// Agents that have applied a directory without the keys.
    #[serde(default)]
    pub acknowledged: u32,
    /// Nodes whose agents have not, or are not connected; the first ones.
    #[serde(default)]
    pub waiting: Vec<String>,
}

/// A condition in the usual shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// One sentence.
    #[serde(default)]
    pub message: String,
    /// When `status` last changed, RFC 3339.
    pub last_transition_time: String,
}

/// Why a stored spec cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
}

impl std::fmt::Display for SpecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} is malformed", self.field, self.value)
    }
}

impl std::error::Error for SpecError {}

/// What the signature of a MeshNode covers: its name and the spec without the signature, as JSON. A field added later
/// must be left out of the JSON while it has its default, or all older signatures become wrong.
pub fn signed_bytes(name: &str, spec: &MeshNodeSpec) -> Vec<u8> {
    let bare = MeshNodeSpec {
        signature: String::new(),
        ..spec.clone()
    };
    serde_json::json!([name, bare]).to_string().into_bytes()
}

impl MeshNodeSpec {
    /// The spec of a living node, unsigned.
    pub fn of(record: &NodeRecord, order: u64) -> Self {
        let text = |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect();
        Self {
            node_uid: record.uid.to_string(),
            order,
            endpoints: text(&record.endpoints),
            addresses: text(&record.addresses),
            prefixes: record.prefixes.iter().map(ToString::to_string).collect(),
            slots: record.slots.iter().map(SlotSpec::of).collect(),
            active: record.active,
            last: record.last,
            datapath: record.datapath.map(|datapath| datapath.to_string()),
            ..Self::default()
        }
    }

    /// Parses a living node; `None` for a tombstone.
    pub fn record(&self, name: &str) -> Result<Option<NodeRecord>, SpecError> {
        if self.retired {
            return Ok(None);
        }
        Ok(Some(NodeRecord {
            name: name.into(),
            uid: self.node_uid.as_str().into(),
            endpoints: parse_all("endpoint", &self.endpoints)?,
            addresses: parse_all("address", &self.addresses)?,
            prefixes: parse_all("prefix", &self.prefixes)?,
            slots: self.slots.iter().map(SlotSpec::key).collect::<Result<_, _>>()?,
            active: self.active,
            last: self.last,
            datapath: self.datapath.as_deref().map(datapath).transpose()?,
        }))
    }
}

impl RevokedKeys {
    /// Parses the keys.
    pub fn keys(&self) -> Result<Vec<PublicKey>, SpecError> {
        parse_all("public key", &self.public_keys)
    }
}

impl SlotSpec {
    fn of(slot: &SlotKey) -> Self {
        Self {
            slot: slot.slot,
            port: slot.port,
            generation: slot.generation,
            public_key: slot.public_key.to_string(),
            pre_shared_keys: slot.pre_shared_keys,
            since: 0,
        }
    }

    fn key(&self) -> Result<SlotKey, SpecError> {
        Ok(SlotKey {
            slot: self.slot,
            port: self.port,
            generation: self.generation,
            public_key: parse("public key", &self.public_key)?,
            pre_shared_keys: self.pre_shared_keys,
        })
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn parse<T: std::str::FromStr>(field: &'static str, value: &str) -> Result<T, SpecError> {
    value.parse().map_err(|_| SpecError {
        field,
        value: value.to_owned(),
    })
}

fn parse_all<T: std::str::FromStr>(field: &'static str, list: &[String]) -> Result<Vec<T>, SpecError> {
    list.iter().map(|value| parse(field, value)).collect()
}

fn datapath(text: &str) -> Result<Datapath, SpecError> {
    match text {
        "kernel" => Ok(Datapath::Kernel),
        "userspace" => Ok(Datapath::Userspace),
        other => Err(SpecError {
            field: "datapath",
            value: other.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> NodeRecord {
        NodeRecord {
            name: "node1".into(),
            uid: "uid1".into(),
            endpoints: vec!["172.30.0.1".parse().unwrap()],
            addresses: vec!["172.30.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            prefixes: vec!["10.244.1.0/24".parse().unwrap()],
            slots: vec![SlotKey {
                slot: 0,
                port: 51871,
                generation: 2,
                public_key: PublicKey::from_bytes([9; 32]).unwrap(),
                pre_shared_keys: true,
            }],
            active: 2,
            last: 3,
            datapath: Some(Datapath::Kernel),
        }
    }

    #[test]
    fn records_survive_the_object() {
        let spec = MeshNodeSpec::of(&record(), 4);
        assert_eq!(spec.record("node1"), Ok(Some(record())));
        let json = serde_json::to_string(&spec).unwrap();
        assert!(json.contains("\"nodeUID\":\"uid1\""));
        assert_eq!(serde_json::from_str::<MeshNodeSpec>(&json).unwrap(), spec);
        let retired = MeshNodeSpec {
            retired: true,
            ..spec
        };
        assert_eq!(retired.record("node1"), Ok(None));
    }

    #[test]
    fn the_signature_covers_name_and_spec_but_not_itself() {
        let spec = MeshNodeSpec::of(&record(), 4);
        let signed = MeshNodeSpec {
            signature: "abc".into(),
            ..spec.clone()
        };
        assert_eq!(signed_bytes("node1", &spec), signed_bytes("node1", &signed));
        assert_ne!(signed_bytes("node1", &spec), signed_bytes("node2", &spec));
        for moved in [
            MeshNodeSpec {
                order: 5,
                ..spec.clone()
            },
            MeshNodeSpec {
                active: 3,
                ..spec.clone()
            },
            MeshNodeSpec {
                last: 2,
                ..spec.clone()
            },
        ] {
            assert_ne!(signed_bytes("node1", &spec), signed_bytes("node1", &moved));
        }
    }

    #[test]
    fn malformed_fields_are_named() {
        let mut spec = MeshNodeSpec::of(&record(), 4);
        spec.slots[0].public_key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".into();
        assert_eq!(spec.record("node1").unwrap_err().field, "public key");
        let mut spec = MeshNodeSpec::of(&record(), 4);
        spec.prefixes[0] = "10.244.1.0/99".into();
        assert_eq!(spec.record("node1").unwrap_err().field, "prefix");
    }
}
