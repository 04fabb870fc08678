//! Brings ownership and identities up to date.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{IdentityId, NodeName, NodeRecord, PodRef};

use super::Endpoints;
use crate::{identities::Identities, labels::workload_labels};

impl Endpoints {
    /// Brings ownership and identities of everything that changed up to date.
    pub(crate) fn settle(
        &mut self,
        nodes: &BTreeMap<NodeName, NodeRecord>,
        identities: &mut Identities,
        now: u64,
    ) {
        // Releasing can make others dirty; a few rounds settle that.
        while !self.dirty.is_empty() {
            for pod in std::mem::take(&mut self.dirty) {
                self.settle_addresses(&pod, nodes);
                self.settle_identity(&pod, identities, now);
            }
        }
    }
    pub(super) fn settle_addresses(&mut self, pod: &PodRef, nodes: &BTreeMap<NodeName, NodeRecord>) {
        let Some(instance) = self.instances.get(pod) else {
            return;
        };
        let (node, wanted) = (instance.node.clone(), instance.wanted());
        let record = nodes.get(&node);
        let mut fault = None;
        let mut allowed = BTreeSet::new();
        for address in wanted {
            let admissible = match record {
                Some(record) => self.admissible(address, record),
                None => Err(format!("node {node} is not a member")),
            };
            match (
                admissible,
                self.owners.get(&address).filter(|owner| *owner != pod),
            ) {
                (Err(reason), _) => fault = Some(format!("pod {pod}: {reason}")),
                (Ok(()), Some(owner)) => {
                    fault = Some(format!(
                        "pod {pod}: address {address} belongs to the living pod {owner}"
                    ));
                }
                (Ok(()), None) => {
                    allowed.insert(address);
                }
            }
        }
        let owned: BTreeSet<_> = self
            .by_node
            .get(&node)
            .into_iter()
            .flatten()
            .filter(|ip| self.owners.get(ip) == Some(pod))
            .copied()
            .collect();
        for address in owned.difference(&allowed) {
            self.disown(pod, *address);
        }
        for address in allowed.difference(&owned) {
            self.owners.insert(*address, pod.clone());
            self.by_node.entry(node.clone()).or_default().insert(*address);
            self.touched.insert(*address);
        }
        match fault {
            Some(fault) => self.unsettled.insert(pod.clone(), fault),
            None => self.unsettled.remove(pod),
        };
    }
    pub(super) fn settle_identity(&mut self, pod: &PodRef, identities: &mut Identities, now: u64) {
        let Some(instance) = self.instances.get(pod) else {
            return;
        };
        let owned: Vec<_> = instance
            .wanted()
            .into_iter()
            .filter(|ip| self.owners.get(ip) == Some(pod))
            .collect();
        let old = instance.identity;
        let new = if owned.is_empty() {
            IdentityId::UNKNOWN
        } else {
            self.identity(pod, &instance.node, identities)
        };
        if !owned.is_empty() {
            self.exhausted |= new == IdentityId::UNKNOWN;
        }
        identities.release(old, now);
        if let Some(instance) = self.instances.get_mut(pod) {
            instance.identity = new;
        }
        if old != new {
            self.touched.extend(owned);
        }
    }
    /// Acquires the identity of an instance.
    pub(super) fn identity(&self, pod: &PodRef, node: &NodeName, identities: &mut Identities) -> IdentityId {
        let known = self
            .pods
            .get(&(pod.namespace.clone(), pod.name.clone()))
            .filter(|known| {
                known.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
                    && known.node.as_ref().is_none_or(|home| home == node)
            });
        match known {
            None => IdentityId::INIT,
            Some(known) if known.mirror => IdentityId::UNMANAGED,
            Some(known) => {
                let namespace = self.namespaces.get(&known.namespace);
                let labels = workload_labels(known, namespace, &self.config.cluster_name);
                identities.acquire(&labels).unwrap_or(IdentityId::UNKNOWN)
            }
        }
    }
}
