//! Brings ownership and identities up to date.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{IdentityId, NodeName, NodeRecord, PodRef};

use super::Endpoints;
use crate::{
    event::Pod,
    identities::{Identities, NoNumber},
    labels::workload_labels,
};

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
    fn settle_addresses(&mut self, pod: &PodRef, nodes: &BTreeMap<NodeName, NodeRecord>) {
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
        let owned = instance.owned.clone();
        for address in owned.difference(&allowed) {
            self.disown(pod, *address);
        }
        for address in allowed.difference(&owned) {
            self.owners.insert(*address, pod.clone());
            if let Some(instance) = self.instances.get_mut(pod) {
                instance.owned.insert(*address);
            }
            self.by_node.entry(node.clone()).or_default().insert(*address);
            self.touched.insert(*address);
        }
        match fault {
            Some(fault) => self.unsettled.insert(pod.clone(), fault),
            None => self.unsettled.remove(pod),
        };
    }
    fn settle_identity(&mut self, pod: &PodRef, identities: &mut Identities, now: u64) {
        let Some(instance) = self.instances.get(pod) else {
            return;
        };
        let owned = instance.owned.clone();
        let old = (instance.identity, instance.policy_audit);
        let identity = if owned.is_empty() {
            Ok(IdentityId::UNKNOWN)
        } else {
            self.identity(pod, &instance.node, identities)
        };
        let known = self.known(pod, &instance.node);
        // A kubelet makes mirror pods with any annotations it likes.
        let policy_audit =
            self.config.pods_may_audit && known.is_some_and(|known| known.policy_audit && !known.mirror);
        let new = match identity {
            Ok(identity) => {
                self.unnumbered.remove(pod);
                identity
            }
            Err(reason) => {
                let before = self.unnumbered.insert(pod.clone(), reason);
                self.refused_identities += u64::from(before.is_none());
                IdentityId::INIT
            }
        };
        // After the new one was acquired: where they are the same, it never becomes idle.
        identities.release(old.0, now);
        if let Some(instance) = self.instances.get_mut(pod) {
            instance.identity = new;
            instance.policy_audit = policy_audit;
        }
        if old != (new, policy_audit) {
            self.touched.extend(&owned);
        }
    }
    /// Pods that got no identity of their own try again.
    pub(crate) fn numbers_freed(&mut self) {
        self.dirty.extend(self.unnumbered.keys().cloned());
    }
    /// The Pod of the source that an instance is, as far as it is known.
    fn known(&self, pod: &PodRef, node: &NodeName) -> Option<&Pod> {
        self.pods
            .get(&(pod.namespace.clone(), pod.name.clone()))
            .filter(|known| {
                known.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
                    && known.node.as_ref().is_none_or(|home| home == node)
            })
    }
    /// Acquires the identity of an instance.
    fn identity(
        &self,
        pod: &PodRef,
        node: &NodeName,
        identities: &mut Identities,
    ) -> Result<IdentityId, NoNumber> {
        match self.known(pod, node) {
            None => Ok(IdentityId::INIT),
            Some(known) if known.mirror => Ok(IdentityId::UNMANAGED),
            // A policy may mean the namespace's labels: without them nobody knows what is denied.
            Some(known) if !self.knows_namespace(&known.namespace) => Ok(IdentityId::INIT),
            Some(known) => {
                let namespace = self.namespaces.get(&known.namespace);
                identities.acquire(&workload_labels(known, namespace, &self.config))
            }
        }
    }
}
