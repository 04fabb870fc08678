//! Directory entries on the wire <-> `warren-model`. What does not parse is an error that names the entry and
//! the field; nothing is guessed.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use prost::Message as _;
use warren_model::{
    Datapath, IdentityId, KeyError, Labels, NodeName, NodeRecord, PodRef, PublicKey, SlotKey, WorkloadRecord,
    policy::{NodeFacts, PolicyRef, Rule, Selector, SelectorId},
};

mod keys;

pub use self::keys::{
    forget_from_proto, forget_to_proto, held_from_proto, held_to_proto, key_to_offer, path_to_proto,
    report_from_proto, report_to_proto, slots_from_offer,
};
use crate::proto;

/// Why an entry of the directory cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// Not the protobuf message that its kind says.
    #[error("entry {key:?} is not a valid {kind} message")]
    Encoding {
        /// The entry's key.
        key: String,
        /// What it should be.
        kind: &'static str,
    },
    /// The entry's key does not belong to its content.
    #[error("entry {key:?} describes {content:?}: key and content must agree")]
    KeyMismatch {
        /// The entry's key.
        key: String,
        /// What its content names.
        content: String,
    },
    /// A kind that this version does not know.
    #[error("entry {key:?} has the unknown kind {kind}")]
    UnknownKind {
        /// The entry's key.
        key: String,
        /// The number.
        kind: i32,
    },
    /// An address that is neither 4 nor 16 bytes.
    #[error("an address has {0} bytes: 4 or 16 are expected")]
    Address(usize),
    /// A prefix length beyond its family's, or bits set after the length.
    #[error("prefix {address}/{length} is malformed")]
    Prefix {
        /// Its address.
        address: IpAddr,
        /// Its length, bits.
        length: u32,
    },
    /// A key that must not be used.
    #[error("public key of slot {slot}: {error}")]
    Key {
        /// Which slot.
        slot: u32,
        /// What is wrong with it.
        error: KeyError,
    },
    /// A number that does not fit its type.
    #[error("{field} {value} is out of range")]
    Range {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A required field is empty.
    #[error("{0} is empty")]
    Empty(&'static str),
}

/// A parsed entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A node with its keys, addresses and prefixes.
    Node(NodeRecord),
    /// The labels of an identity.
    Identity(IdentityId, Labels),
    /// The owner of a pod address.
    Workload(WorkloadRecord),
    /// A selector that rules name.
    Selector(SelectorId, Selector),
    /// Members of a selector in one block of 256 identities (block = identity / 256); never empty.
    Members(SelectorId, u32, BTreeSet<IdentityId>),
    /// All rules of a policy object; never empty.
    Policy(PolicyRef, Vec<Rule<SelectorId>>),
    /// What policy has to know of a node.
    NodeFacts(NodeName, NodeFacts),
}

impl Record {
    /// Kind and key under which the directory keeps it.
    pub fn key(&self) -> (proto::EntryKind, String) {
        match self {
            Self::Node(node) => (proto::EntryKind::EntryNode, node.name.to_string()),
            Self::Identity(number, _) => (proto::EntryKind::EntryIdentity, number.to_string()),
            Self::Workload(workload) => (proto::EntryKind::EntryWorkload, workload.ip.to_string()),
            Self::Selector(id, _) => (proto::EntryKind::EntrySelector, id.to_string()),
            Self::Members(id, block, _) => (proto::EntryKind::EntryMembers, format!("{id}/{block}")),
            Self::Policy(policy, _) => (proto::EntryKind::EntryPolicy, policy_key(policy)),
            Self::NodeFacts(name, _) => (proto::EntryKind::EntryNodeFacts, name.to_string()),
        }
    }

    /// The entry on the wire. Equal records encode to equal bytes (the digest rests on it).
    pub fn to_entry(&self) -> proto::Entry {
        let (kind, key) = self.key();
        let value = match self {
            Self::Node(node) => node_to_proto(node).encode_to_vec(),
            Self::Identity(number, labels) => encode_identity(*number, labels),
            Self::Workload(workload) => workload_to_proto(workload).encode_to_vec(),
            Self::Selector(_, selector) => proto::SelectorEntry {
                selector_json: json(selector),
            }
            .encode_to_vec(),
            Self::Members(_, _, members) => proto::MembersEntry {
                offsets: members.iter().map(|id| id.0 % MEMBERS_BLOCK).collect(),
            }
            .encode_to_vec(),
            Self::Policy(_, rules) => proto::PolicyEntry {
                rules_json: json(rules),
            }
            .encode_to_vec(),
            Self::NodeFacts(name, facts) => proto::NodeFactsEntry {
                name: name.to_string(),
                facts_json: json(facts),
            }
            .encode_to_vec(),
        };
        proto::Entry {
            kind: kind.into(),
            key,
            value,
        }
    }

    /// Parses an entry and checks that its key belongs to its content.
    pub fn parse(entry: &proto::Entry) -> Result<Self, ConvertError> {
        let encoding = |kind| ConvertError::Encoding {
            key: entry.key.clone(),
            kind,
        };
        let value = entry.value.as_slice();
        let record = match proto::EntryKind::try_from(entry.kind) {
            Ok(proto::EntryKind::EntryNode) => {
                let node = proto::NodeEntry::decode(value).map_err(|_| encoding("NodeEntry"))?;
                Self::Node(node_from_proto(&node)?)
            }
            Ok(proto::EntryKind::EntryIdentity) => {
                let identity = proto::IdentityEntry::decode(value).map_err(|_| encoding("IdentityEntry"))?;
                let labels = Labels(identity.labels.into_iter().collect());
                Self::Identity(IdentityId(identity.number), labels)
            }
            Ok(proto::EntryKind::EntryWorkload) => {
                let workload = proto::WorkloadEntry::decode(value).map_err(|_| encoding("WorkloadEntry"))?;
                Self::Workload(workload_from_proto(&workload)?)
            }
            Ok(proto::EntryKind::EntrySelector) => {
                let selector = proto::SelectorEntry::decode(value).map_err(|_| encoding("SelectorEntry"))?;
                let id = entry.key.parse().map_err(|_| encoding("SelectorEntry"))?;
                Self::Selector(
                    SelectorId(id),
                    from_json(&selector.selector_json).ok_or_else(|| encoding("SelectorEntry"))?,
                )
            }
            Ok(proto::EntryKind::EntryMembers) => {
                let members = proto::MembersEntry::decode(value).map_err(|_| encoding("MembersEntry"))?;
                members_from(&entry.key, &members).ok_or_else(|| encoding("MembersEntry"))?
            }
            Ok(proto::EntryKind::EntryPolicy) => {
                let policy = proto::PolicyEntry::decode(value).map_err(|_| encoding("PolicyEntry"))?;
                let rules: Option<Vec<Rule<SelectorId>>> = from_json(&policy.rules_json);
                let rules = rules.ok_or_else(|| encoding("PolicyEntry"))?;
                let first = rules.first().ok_or_else(|| encoding("PolicyEntry"))?;
                if rules.iter().any(|rule| rule.policy != first.policy) {
                    return Err(encoding("PolicyEntry"));
                }
                Self::Policy(first.policy.clone(), rules)
            }
            Ok(proto::EntryKind::EntryNodeFacts) => {
                let entry = proto::NodeFactsEntry::decode(value).map_err(|_| encoding("NodeFactsEntry"))?;
                let facts = from_json(&entry.facts_json).ok_or_else(|| encoding("NodeFactsEntry"))?;
                Self::NodeFacts(entry.name.into(), facts)
            }
            Ok(proto::EntryKind::EntryUnspecified) | Err(_) => {
                return Err(ConvertError::UnknownKind {
                    key: entry.key.clone(),
                    kind: entry.kind,
                });
            }
        };
        let (_, content) = record.key();
        if content != entry.key {
            return Err(ConvertError::KeyMismatch {
                key: entry.key.clone(),
                content,
            });
        }
        Ok(record)
    }
}

/// How many identities a members entry covers.
pub const MEMBERS_BLOCK: u32 = 256;

/// The key of a policy object's entry.
pub fn policy_key(policy: &PolicyRef) -> String {
    format!("{}/{}/{}", policy.kind.name(), policy.namespace, policy.name)
}

/// These types have no map with other keys than strings, so that they are always JSON.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn from_json<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

fn members_from(key: &str, members: &proto::MembersEntry) -> Option<Record> {
    let (id, block) = key.split_once('/')?;
    let (id, block) = (SelectorId(id.parse().ok()?), block.parse::<u32>().ok()?);
    let first = block.checked_mul(MEMBERS_BLOCK)?;
    let in_block = members.offsets.iter().all(|offset| *offset < MEMBERS_BLOCK);
    if !in_block || members.offsets.is_empty() {
        return None;
    }
    let members = members.offsets.iter().map(|offset| IdentityId(first + offset));
    Some(Record::Members(id, block, members.collect()))
}

/// Encodes an identity with its labels sorted: a generated map has no stable order.
fn encode_identity(number: IdentityId, labels: &Labels) -> Vec<u8> {
    let mut out = proto::IdentityEntry {
        number: number.0,
        labels: Default::default(),
    }
    .encode_to_vec();
    for (key, value) in &labels.0 {
        let one = proto::IdentityEntry {
            number: 0,
            labels: [(key.clone(), value.clone())].into(),
        };
        // Concatenated messages merge (protobuf encoding specification, "Last One Wins"): one map entry each.
        out.extend(one.encode_to_vec());
    }
    out
}

/// An address as 4 or 16 bytes in network order.
pub fn address_to_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Parses 4 or 16 bytes in network order.
pub fn address_from_bytes(bytes: &[u8]) -> Result<IpAddr, ConvertError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(IpAddr::from)
        .map_err(|_| ConvertError::Address(bytes.len()))
}

fn addresses_from(list: &[Vec<u8>]) -> Result<Vec<IpAddr>, ConvertError> {
    list.iter().map(|bytes| address_from_bytes(bytes)).collect()
}

/// A prefix on the wire.
pub fn prefix_to_proto(prefix: IpNet) -> proto::Prefix {
    proto::Prefix {
        address: address_to_bytes(prefix.addr()),
        length: prefix.prefix_len().into(),
    }
}

/// Parses a prefix; bits set after its length are refused.
pub fn prefix_from_proto(prefix: &proto::Prefix) -> Result<IpNet, ConvertError> {
    let address = address_from_bytes(&prefix.address)?;
    let bad = ConvertError::Prefix {
        address,
        length: prefix.length,
    };
    let Ok(length) = u8::try_from(prefix.length) else {
        return Err(bad);
    };
    match IpNet::new(address, length) {
        Ok(net) if net.trunc() == net => Ok(net),
        _ => Err(bad),
    }
}

/// A slot on the wire.
pub fn slot_to_proto(slot: &SlotKey) -> proto::Slot {
    proto::Slot {
        slot: slot.slot.into(),
        port: slot.port.into(),
        generation: slot.generation,
        public_key: slot.public_key.as_bytes().to_vec(),
        pre_shared_keys: slot.pre_shared_keys,
    }
}

/// Parses a slot; zero and low-order keys are refused.
pub fn slot_from_proto(slot: &proto::Slot) -> Result<SlotKey, ConvertError> {
    let key = slot_from_parts(slot.slot, slot.port, slot.generation, &slot.public_key)?;
    Ok(SlotKey {
        pre_shared_keys: slot.pre_shared_keys,
        ..key
    })
}

/// A slot without pre-shared keys.
fn slot_from_parts(slot: u32, port: u32, generation: u64, key: &[u8]) -> Result<SlotKey, ConvertError> {
    let range = |field, value: u32| ConvertError::Range {
        field,
        value: value.into(),
    };
    let index = u8::try_from(slot)
        .ok()
        .filter(|index| *index < warren_model::node::SLOTS);
    let udp_port = u16::try_from(port).ok().filter(|port| *port != 0);
    if generation == 0 {
        return Err(ConvertError::Range {
            field: "generation",
            value: 0,
        });
    }
    Ok(SlotKey {
        slot: index.ok_or_else(|| range("slot", slot))?,
        port: udp_port.ok_or_else(|| range("port", port))?,
        generation,
        public_key: PublicKey::try_from(key).map_err(|error| ConvertError::Key { slot, error })?,
        pre_shared_keys: false,
    })
}

/// A datapath on the wire.
pub fn datapath_to_proto(datapath: Option<Datapath>) -> proto::Datapath {
    match datapath {
        None => proto::Datapath::Unspecified,
        Some(Datapath::Kernel) => proto::Datapath::Kernel,
        Some(Datapath::Userspace) => proto::Datapath::Userspace,
    }
}

/// Parses a datapath; an unknown number is an error, unspecified is `None`.
pub fn datapath_from_proto(datapath: i32) -> Result<Option<Datapath>, ConvertError> {
    match proto::Datapath::try_from(datapath) {
        Ok(proto::Datapath::Unspecified) => Ok(None),
        Ok(proto::Datapath::Kernel) => Ok(Some(Datapath::Kernel)),
        Ok(proto::Datapath::Userspace) => Ok(Some(Datapath::Userspace)),
        Err(_) => Err(ConvertError::Range {
            field: "datapath",
            value: u64::from(datapath.unsigned_abs()),
        }),
    }
}

/// A node on the wire.
pub fn node_to_proto(node: &NodeRecord) -> proto::NodeEntry {
    proto::NodeEntry {
        name: node.name.to_string(),
        uid: node.uid.to_string(),
        endpoints: node.endpoints.iter().copied().map(address_to_bytes).collect(),
        addresses: node.addresses.iter().copied().map(address_to_bytes).collect(),
        prefixes: node.prefixes.iter().copied().map(prefix_to_proto).collect(),
        slots: node.slots.iter().map(slot_to_proto).collect(),
        active: node.active,
        last: node.last,
        datapath: datapath_to_proto(node.datapath).into(),
    }
}

/// Parses a node.
pub fn node_from_proto(node: &proto::NodeEntry) -> Result<NodeRecord, ConvertError> {
    if node.name.is_empty() {
        return Err(ConvertError::Empty("node name"));
    }
    if node.uid.is_empty() {
        return Err(ConvertError::Empty("node UID"));
    }
    Ok(NodeRecord {
        name: node.name.as_str().into(),
        uid: node.uid.as_str().into(),
        endpoints: addresses_from(&node.endpoints)?,
        addresses: addresses_from(&node.addresses)?,
        prefixes: node
            .prefixes
            .iter()
            .map(prefix_from_proto)
            .collect::<Result<_, _>>()?,
        slots: node.slots.iter().map(slot_from_proto).collect::<Result<_, _>>()?,
        active: node.active,
        last: node.last,
        datapath: datapath_from_proto(node.datapath)?,
    })
}

/// A workload on the wire.
pub fn workload_to_proto(workload: &WorkloadRecord) -> proto::WorkloadEntry {
    proto::WorkloadEntry {
        address: address_to_bytes(workload.ip),
        node: workload.node.to_string(),
        identity: workload.identity.0,
        namespace: workload.pod.namespace.clone(),
        pod: workload.pod.name.clone(),
        uid: workload.pod.uid.clone(),
        policy_audit: workload.policy_audit,
    }
}

/// Parses a workload.
pub fn workload_from_proto(workload: &proto::WorkloadEntry) -> Result<WorkloadRecord, ConvertError> {
    if workload.node.is_empty() {
        return Err(ConvertError::Empty("node of a workload"));
    }
    Ok(WorkloadRecord {
        ip: address_from_bytes(&workload.address)?,
        node: workload.node.as_str().into(),
        identity: IdentityId(workload.identity),
        pod: PodRef {
            namespace: workload.namespace.clone(),
            name: workload.pod.clone(),
            uid: workload.uid.clone(),
        },
        policy_audit: workload.policy_audit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeRecord {
        NodeRecord {
            name: "node1".into(),
            uid: "uid1".into(),
            endpoints: vec!["172.30.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            addresses: vec!["172.30.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            prefixes: vec![
                "10.244.1.0/24".parse().unwrap(),
                "fd00:10:244:1::/64".parse().unwrap(),
            ],
            slots: vec![SlotKey {
                slot: 2,
                port: 51873,
                generation: 7,
                public_key: PublicKey::from_bytes([9; 32]).unwrap(),
                pre_shared_keys: true,
            }],
            active: 7,
            last: 8,
            datapath: Some(Datapath::Userspace),
        }
    }

    #[test]
    fn records_survive_the_wire() {
        let labels = Labels((0..20).map(|n| (format!("k8s:l{n}"), n.to_string())).collect());
        let pod = PodRef {
            namespace: "a".into(),
            name: "b".into(),
            uid: "c".into(),
        };
        let workload = WorkloadRecord {
            ip: "10.244.1.7".parse().unwrap(),
            node: "node1".into(),
            identity: IdentityId(256),
            pod,
            policy_audit: false,
        };
        for record in [
            Record::Node(node()),
            Record::Identity(IdentityId(300), labels),
            Record::Identity(IdentityId(301), Labels::default()),
            Record::Workload(workload),
        ] {
            let entry = record.to_entry();
            assert_eq!(Record::parse(&entry).as_ref(), Ok(&record));
            assert_eq!(record.to_entry(), entry, "stable encoding");
        }
    }

    #[test]
    fn an_entry_under_a_foreign_key_is_refused() {
        let mut entry = Record::Node(node()).to_entry();
        entry.key = "node2".into();
        assert!(matches!(
            Record::parse(&entry),
            Err(ConvertError::KeyMismatch { .. })
        ));
    }

    #[test]
    fn malformed_fields_are_named() {
        let good = node_to_proto(&node());
        let mut bad = good.clone();
        bad.addresses[0] = vec![1, 2, 3];
        assert_eq!(node_from_proto(&bad), Err(ConvertError::Address(3)));
        let mut bad = good.clone();
        bad.prefixes[0].address[3] = 1;
        assert!(matches!(node_from_proto(&bad), Err(ConvertError::Prefix { .. })));
        let mut bad = good.clone();
        bad.prefixes[0].length = 300;
        assert!(matches!(node_from_proto(&bad), Err(ConvertError::Prefix { .. })));
        let mut bad = good.clone();
        bad.slots[0].public_key = vec![0; 32];
        assert_eq!(
            node_from_proto(&bad),
            Err(ConvertError::Key {
                slot: 2,
                error: KeyError::Zero
            })
        );
        let mut bad = good.clone();
        bad.slots[0].slot = 4;
        assert!(matches!(
            node_from_proto(&bad),
            Err(ConvertError::Range { field: "slot", .. })
        ));
        let mut bad = good;
        bad.datapath = 9;
        assert!(matches!(node_from_proto(&bad), Err(ConvertError::Range { .. })));
        let junk = proto::Entry {
            kind: 1,
            key: "x".into(),
            value: vec![0xff],
        };
        assert!(matches!(Record::parse(&junk), Err(ConvertError::Encoding { .. })));
        let junk = proto::Entry {
            kind: 77,
            key: "x".into(),
            value: vec![],
        };
        assert!(matches!(
            Record::parse(&junk),
            Err(ConvertError::UnknownKind { .. })
        ));
    }
}
