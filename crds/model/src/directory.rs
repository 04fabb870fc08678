//! The directory rules (design: first owner wins, one bad entry is skipped and reported, never the set).
//!
//! A pure function that `keyd` runs before it publishes and every agent runs again before it touches a
//! device, so that neither trusts the other's diligence.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    config::ClusterConfig,
    key::PublicKey,
    node::{NodeName, NodeRecord, SLOTS},
};

/// Why a part of a node's record is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whose record.
    pub node: NodeName,
    /// What was refused and why.
    pub reason: RefusalReason,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}: {}", self.node, self.reason)
    }
}

/// The rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusalReason {
    /// Another node owned the key first.
    #[error("public key {key} already belongs to node {owner}")]
    DuplicateKey {
        /// The key.
        key: PublicKey,
        /// Its first owner.
        owner: NodeName,
    },
    /// A slot number out of range, or listed twice.
    #[error("slot {0} is out of range or listed twice")]
    BadSlot(u8),
    /// The very same prefix has another owner.
    #[error("prefix {prefix} already belongs to node {owner}")]
    DuplicatePrefix {
        /// The prefix.
        prefix: IpNet,
        /// Its first owner.
        owner: NodeName,
    },
    /// Overlaps another node's podCIDR.
    #[error("prefix {prefix} overlaps {other}, which already belongs to node {owner}")]
    OverlapsPrefix {
        /// The prefix.
        prefix: IpNet,
        /// What it overlaps.
        other: IpNet,
        /// The first owner of that.
        owner: NodeName,
    },
    /// Not inside the operator's pod pools.
    #[error("prefix {0} lies outside podPools")]
    OutsidePools(IpNet),
    /// A default route or an overlap with a service CIDR.
    #[error("prefix {prefix} overlaps {other}, which is reserved")]
    Reserved {
        /// The prefix.
        prefix: IpNet,
        /// What it overlaps.
        other: IpNet,
    },
    /// A prefix that covers a node's address.
    #[error("prefix {prefix} covers the node address {address}")]
    CoversNode {
        /// The prefix.
        prefix: IpNet,
        /// The address.
        address: IpAddr,
    },
    /// Another node owned the address first.
    #[error("node address {address} already belongs to node {owner}")]
    DuplicateAddress {
        /// The address.
        address: IpAddr,
        /// Its first owner.
        owner: NodeName,
    },
    /// Not inside the operator's node pools.
    #[error("node address {0} lies outside nodePools")]
    AddressOutsidePools(IpAddr),
}

/// The records that may be used, stripped of what was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Accepted records by name, in the order of the names.
    pub nodes: BTreeMap<NodeName, NodeRecord>,
    /// What was refused.
    pub refused: Vec<Refusal>,
}

/// Applies the directory rules to `records`. The order is the order of ownership: the first owner of a key,
/// a prefix or an address keeps it.
pub fn check<'a>(config: &ClusterConfig, records: impl IntoIterator<Item = &'a NodeRecord>) -> Checked {
    let records: Vec<_> = records.into_iter().collect();
    let mut out = Checked::default();
    let mut keys: HashMap<PublicKey, &NodeName> = HashMap::new();
    let mut prefixes: HashMap<IpNet, &NodeName> = HashMap::new();
    let mut addresses: BTreeMap<IpAddr, &NodeName> = BTreeMap::new();
    let mut kept: Vec<NodeRecord> = Vec::with_capacity(records.len());

    for &record in &records {
        let mut refuse = |reason| {
            out.refused.push(Refusal {
                node: record.name.clone(),
                reason,
            })
        };
        let mut node = record.clone();
        node.addresses.retain(|&address| match addresses.get(&address) {
            Some(owner) if **owner != record.name => {
                refuse(RefusalReason::DuplicateAddress {
                    address,
                    owner: (*owner).clone(),
                });
                false
            }
            _ if !config.node_pools.iter().any(|pool| pool.contains(&address)) => {
                refuse(RefusalReason::AddressOutsidePools(address));
                false
            }
            _ => {
                addresses.insert(address, &record.name);
                true
            }
        });
        let own = &node.addresses;
        node.endpoints.retain(|endpoint| own.contains(endpoint));
        let mut used = [false; SLOTS as usize];
        node.slots.retain(|slot| {
            match used.get_mut(usize::from(slot.slot)) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    refuse(RefusalReason::BadSlot(slot.slot));
                    return false;
                }
            }
            let owner = *keys.entry(slot.public_key).or_insert(&record.name);
            if *owner != record.name {
                refuse(RefusalReason::DuplicateKey {
                    key: slot.public_key,
                    owner: owner.clone(),
                });
            }
            *owner == record.name
        });
        kept.push(node);
    }
    for (node, record) in kept.iter_mut().zip(&records) {
        let mut refuse = |reason| {
            out.refused.push(Refusal {
                node: record.name.clone(),
                reason,
            })
        };
        node.prefixes.retain(|prefix| {
            match prefix_fault(config, &addresses, &prefixes, *prefix, &record.name) {
                Some(reason) => {
                    refuse(reason);
                    false
                }
                None => {
                    prefixes.insert(*prefix, &record.name);
                    true
                }
            }
        });
    }
    out.nodes = kept.into_iter().map(|node| (node.name.clone(), node)).collect();
    out
}

fn prefix_fault(
    config: &ClusterConfig,
    addresses: &BTreeMap<IpAddr, &NodeName>,
    owners: &HashMap<IpNet, &NodeName>,
    prefix: IpNet,
    node: &NodeName,
) -> Option<RefusalReason> {
    let overlaps = |other: &IpNet| other.contains(&prefix) || prefix.contains(other);
    if let Some(other) = config
        .service_cidrs
        .iter()
        .chain(&config.node_pools)
        .find(|other| overlaps(other))
    {
        return Some(RefusalReason::Reserved {
            prefix,
            other: *other,
        });
    }
    if prefix.prefix_len() == 0 {
        return Some(RefusalReason::Reserved {
            prefix,
            other: prefix,
        });
    }
    if !config.pod_pools.iter().any(|pool| pool.contains(&prefix)) {
        return Some(RefusalReason::OutsidePools(prefix));
    }
    // A range, not a scan: with `prefixSource: podIP` there are as many prefixes as pods.
    if let Some((address, _)) = addresses.range(prefix.network()..=prefix.broadcast()).next() {
        return Some(RefusalReason::CoversNode {
            prefix,
            address: *address,
        });
    }
    match owners.get(&prefix) {
        Some(owner) if *owner != node => Some(RefusalReason::DuplicatePrefix {
            prefix,
            owner: (*owner).clone(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{Datapath, SlotKey};

    fn config() -> ClusterConfig {
        ClusterConfig {
            cluster_name: "default".into(),
            encryption: true,
            pod_pools: vec![
                "10.244.0.0/16".parse().unwrap(),
                "fd00:10:244::/48".parse().unwrap(),
            ],
            node_pools: vec!["172.30.0.0/24".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
            prefix_source: Default::default(),
            datapath: Default::default(),
            wireguard_port: 51871,
            keyd_port: 4250,
            apiserver_port: 6443,
            keepalive_seconds: 25,
            pre_shared_keys: true,
            mark_mask: 0x3f7f,
            node_ports: (30_000, 32_767),
            host_reaches_pods: true,
            policy_audit: false,
            pods_may_audit: false,
            ignored_labels: crate::config::default_ignored_labels(),
            identities_per_namespace: crate::config::default_identities_per_namespace(),
            snapshot_expiry_seconds: 86400,
            snapshot_hard_fail: false,
            signing_key_max_age_seconds: 0,
        }
    }

    fn node(n: u8) -> NodeRecord {
        NodeRecord {
            name: format!("node{n}").into(),
            uid: format!("uid{n}").into(),
            endpoints: vec![IpAddr::from([172, 30, 0, n])],
            addresses: vec![IpAddr::from([172, 30, 0, n])],
            prefixes: vec![format!("10.244.{n}.0/24").parse().unwrap()],
            slots: vec![SlotKey {
                slot: 0,
                port: 51871,
                generation: 1,
                public_key: PublicKey::from_bytes([n + 2; 32]).unwrap(),
                pre_shared_keys: false,
            }],
            active: 1,
            last: 1,
            datapath: Some(Datapath::Userspace),
        }
    }

    #[test]
    fn honest_nodes_pass_unchanged() {
        let nodes = [node(1), node(2)];
        let checked = check(&config(), &nodes);
        assert_eq!(checked.refused, []);
        assert_eq!(checked.nodes.into_values().collect::<Vec<_>>(), nodes);
    }

    #[test]
    fn the_first_owner_keeps_key_prefix_and_address() {
        let mut thief = node(2);
        thief.slots[0].public_key = node(1).slots[0].public_key;
        thief.prefixes.push("10.244.1.0/24".parse().unwrap());
        thief.addresses.push(IpAddr::from([172, 30, 0, 1]));
        thief.endpoints.push(IpAddr::from([172, 30, 0, 1]));
        let checked = check(&config(), &[node(1), thief]);
        assert_eq!(checked.nodes[&"node1".into()], node(1));
        let thief = &checked.nodes[&"node2".into()];
        assert!(thief.slots.is_empty());
        assert_eq!(thief.prefixes, node(2).prefixes);
        assert_eq!(thief.endpoints, node(2).endpoints);
        assert_eq!(checked.refused.len(), 3);
    }

    #[test]
    fn prefixes_outside_the_pools_or_over_reserved_ones_are_refused_one_by_one() {
        for bad in [
            "10.245.0.0/24",
            "0.0.0.0/0",
            "10.96.1.0/24",
            "172.30.0.0/25",
            "10.0.0.0/8",
            "::/0",
        ] {
            let mut liar = node(1);
            liar.prefixes.push(bad.parse().unwrap());
            let checked = check(&config(), &[liar]);
            assert_eq!(checked.nodes[&"node1".into()], node(1), "{bad}");
            assert_eq!(checked.refused.len(), 1, "{bad}");
        }
    }

    #[test]
    fn more_specific_prefixes_may_nest() {
        let mut guest = node(2);
        guest.prefixes.push("10.244.1.7/32".parse().unwrap());
        assert_eq!(check(&config(), &[node(1), guest]).refused, []);
    }
}
