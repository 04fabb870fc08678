//! Who owns which node address and podCIDR: the first one that claimed it, for as long as it claims it.
//!
//! `warren_model::directory::check` decides by the order of records. That is not enough over time: a node that was
//! registered early must not be able to take what a later one has had since yesterday. So ownership is remembered
//! here, and `check` sees only what is left.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use warren_model::{
    ClusterConfig, NodeName, NodeRecord,
    directory::{Checked, Refusal, RefusalReason, check},
};

/// Owners so far.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    addresses: BTreeMap<IpAddr, NodeName>,
    prefixes: BTreeMap<IpNet, NodeName>,
}

impl Claims {
    /// Remembers what a stored record owned.
    pub(crate) fn seed(&mut self, record: &NodeRecord) {
        for address in &record.addresses {
            self.addresses
                .entry(*address)
                .or_insert_with(|| record.name.clone());
        }
        for prefix in &record.prefixes {
            self.prefixes
                .entry(*prefix)
                .or_insert_with(|| record.name.clone());
        }
    }

    /// Applies all directory rules to what the nodes claim, given in their order of ownership.
    pub(crate) fn settle(&mut self, config: &ClusterConfig, claimed: &[NodeRecord]) -> Checked {
        let mut refused = vec![];
        // What a node may not have by itself must not block another: a prefix outside the pools owns nothing.
        let mut valid: BTreeMap<NodeName, NodeRecord> = BTreeMap::new();
        for record in claimed {
            let one = check(config, [record]);
            refused.extend(one.refused);
            valid.extend(one.nodes);
        }
        let claims = |owner: &NodeName, has: &dyn Fn(&NodeRecord) -> bool| valid.get(owner).is_some_and(has);
        self.addresses
            .retain(|address, owner| claims(owner, &|record| record.addresses.contains(address)));
        self.prefixes
            .retain(|prefix, owner| claims(owner, &|record| record.prefixes.contains(prefix)));

        let mut kept = Vec::with_capacity(claimed.len());
        for record in claimed {
            let Some(mut record) = valid.remove(&record.name) else {
                continue;
            };
            let name = record.name.clone();
            let mut refuse = |reason| {
                refused.push(Refusal {
                    node: name.clone(),
                    reason,
                })
            };
            record
                .addresses
                .retain(|address| match self.claim_address(*address, &name) {
                    Ok(()) => true,
                    Err(reason) => {
                        refuse(reason);
                        false
                    }
                });
            record
                .prefixes
                .retain(|prefix| match self.claim_prefix(*prefix, &name) {
                    Ok(()) => true,
                    Err(reason) => {
                        refuse(reason);
                        false
                    }
                });
            kept.push(record);
        }
        let mut checked = check(config, &kept);
        refused.append(&mut checked.refused);
        Checked {
            nodes: checked.nodes,
            refused,
        }
    }

    fn claim_address(&mut self, address: IpAddr, node: &NodeName) -> Result<(), RefusalReason> {
        let owner = self.addresses.entry(address).or_insert_with(|| node.clone());
        if owner == node {
            return Ok(());
        }
        Err(RefusalReason::DuplicateAddress {
            address,
            owner: owner.clone(),
        })
    }

    fn claim_prefix(&mut self, prefix: IpNet, node: &NodeName) -> Result<(), RefusalReason> {
        match self.overlapping(prefix, node) {
            None => {
                self.prefixes.insert(prefix, node.clone());
                Ok(())
            }
            Some((other, owner)) if other == prefix => Err(RefusalReason::DuplicatePrefix { prefix, owner }),
            Some((other, owner)) => Err(RefusalReason::OverlapsPrefix { prefix, other, owner }),
        }
    }

    /// A prefix of another node that holds `prefix` or lies within it.
    fn overlapping(&self, prefix: IpNet, node: &NodeName) -> Option<(IpNet, NodeName)> {
        let foreign = |(other, owner): (&IpNet, &NodeName)| (owner != node).then(|| (*other, owner.clone()));
        let around = (0..=prefix.prefix_len())
            .filter_map(|length| IpNet::new(prefix.addr(), length).ok())
            .find_map(|wider| self.prefixes.get_key_value(&wider.trunc()).and_then(foreign));
        around.or_else(|| {
            // Sorted by address, then length: everything within starts between network and broadcast address.
            let last = IpNet::new(prefix.broadcast(), prefix.max_prefix_len()).ok()?;
            self.prefixes.range(prefix.trunc()..=last).find_map(foreign)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::tests::config;

    fn node(name: &str, address: &str, prefix: &str) -> NodeRecord {
        NodeRecord {
            name: name.into(),
            uid: name.into(),
            endpoints: vec![address.parse().unwrap()],
            addresses: vec![address.parse().unwrap()],
            prefixes: vec![prefix.parse().unwrap()],
            slots: vec![],
            active: 0,
            last: 0,
            datapath: None,
        }
    }

    #[test]
    fn an_early_node_cannot_take_what_a_later_one_has() {
        let mut claims = Claims::default();
        let early = node("a", "172.30.0.1", "10.244.1.0/24");
        let late = node("b", "172.30.0.2", "10.244.2.0/24");
        assert_eq!(
            claims.settle(&config(), &[early.clone(), late.clone()]).refused,
            []
        );
        let mut thief = early.clone();
        thief.addresses.push("172.30.0.2".parse().unwrap());
        thief.prefixes.push("10.244.2.0/24".parse().unwrap());
        let checked = claims.settle(&config(), &[thief, late.clone()]);
        assert_eq!(checked.nodes[&"a".into()], early);
        assert_eq!(checked.nodes[&"b".into()], late);
        assert_eq!(checked.refused.len(), 2);
    }

    #[test]
    fn overlapping_pod_cidrs_are_refused_both_ways() {
        for (first, second) in [
            ("10.244.2.0/24", "10.244.2.128/25"),
            ("10.244.2.128/25", "10.244.2.0/24"),
            ("10.244.2.0/24", "10.244.2.0/24"),
            ("10.244.0.0/16", "10.244.9.0/24"),
            ("10.244.9.0/24", "10.244.0.0/16"),
        ] {
            let nodes = [node("a", "172.30.0.1", first), node("b", "172.30.0.2", second)];
            let checked = Claims::default().settle(&config(), &nodes);
            assert_eq!(checked.nodes[&"a".into()].prefixes.len(), 1, "{first} {second}");
            assert_eq!(checked.nodes[&"b".into()].prefixes.len(), 0, "{first} {second}");
            assert_eq!(checked.refused.len(), 1, "{first} {second}");
        }
    }

    #[test]
    fn a_refused_prefix_blocks_nobody() {
        let nodes = [
            node("a", "172.30.0.1", "10.0.0.0/8"),
            node("b", "172.30.0.2", "10.244.2.0/24"),
        ];
        let checked = Claims::default().settle(&config(), &nodes);
        assert_eq!(checked.nodes[&"b".into()], nodes[1]);
        assert_eq!(checked.refused.len(), 1);
    }

    #[test]
    fn what_is_given_up_is_free_and_what_is_stored_is_remembered() {
        let mut claims = Claims::default();
        let b = node("b", "172.30.0.2", "10.244.2.0/24");
        claims.seed(&b);
        let a = node("a", "172.30.0.2", "10.244.2.0/24");
        let checked = claims.settle(&config(), &[a.clone(), b]);
        assert!(checked.nodes[&"a".into()].addresses.is_empty());
        let checked = claims.settle(&config(), std::slice::from_ref(&a));
        assert_eq!(checked.nodes[&"a".into()], a);
    }
}
