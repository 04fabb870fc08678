//! Pods, their addresses and identities.
//!
//! An *instance* is a living pod with a UID. It holds addresses that the API's status names (Kubernetes) or that the
//! agent of its node reported (CNI ADD). An address has one owner: the first living instance that may have it.

mod admission;
mod settle;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use warren_model::{ClusterConfig, IdentityId, NodeName, PodRef, WorkloadRecord};

use crate::{
    event::{Mode, Namespace, Pod},
    identities::{Identities, NoNumber},
    stored::StoredEndpoint,
};

/// No pod has more addresses than this.
const MAX_ADDRESSES: usize = 16;

#[derive(Debug)]
struct Instance {
    node: NodeName,
    /// By the node's agent.
    reported: BTreeSet<IpAddr>,
    /// By the API.
    status: BTreeSet<IpAddr>,
    /// Those of them that it owns.
    owned: BTreeSet<IpAddr>,
    /// Given up by the node's agent, whatever the API still says.
    released: BTreeSet<IpAddr>,
    identity: IdentityId,
    policy_audit: bool,
}

impl Instance {
    fn new(node: NodeName) -> Self {
        Self {
            node,
            reported: BTreeSet::new(),
            status: BTreeSet::new(),
            owned: BTreeSet::new(),
            released: BTreeSet::new(),
            identity: IdentityId::UNKNOWN,
            policy_audit: false,
        }
    }

    fn wanted(&self) -> BTreeSet<IpAddr> {
        self.reported
            .union(&self.status)
            .filter(|ip| !self.released.contains(ip))
            .copied()
            .collect()
    }
}

/// All pods.
#[derive(Debug)]
pub(crate) struct Endpoints {
    mode: Mode,
    config: ClusterConfig,
    pods: BTreeMap<(String, String), Pod>,
    namespaces: BTreeMap<String, Namespace>,
    instances: BTreeMap<PodRef, Instance>,
    owners: BTreeMap<IpAddr, PodRef>,
    by_node: BTreeMap<NodeName, BTreeSet<IpAddr>>,
    dirty: BTreeSet<PodRef>,
    unsettled: BTreeMap<PodRef, String>,
    /// Why some have no identity of their own; they stay closed.
    unnumbered: BTreeMap<PodRef, NoNumber>,
    /// How many were refused one.
    pub(crate) refused_identities: u64,
    touched: BTreeSet<IpAddr>,
    /// Instances whose durable part may have changed.
    changed: BTreeSet<PodRef>,
}

impl Endpoints {
    pub(crate) fn new(mode: Mode, config: ClusterConfig, stored: Vec<StoredEndpoint>) -> Self {
        let mut out = Self {
            mode,
            config,
            pods: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            instances: BTreeMap::new(),
            owners: BTreeMap::new(),
            by_node: BTreeMap::new(),
            dirty: BTreeSet::new(),
            unsettled: BTreeMap::new(),
            unnumbered: BTreeMap::new(),
            refused_identities: 0,
            touched: BTreeSet::new(),
            changed: BTreeSet::new(),
        };
        for endpoint in stored {
            let mut instance = Instance::new(endpoint.node);
            instance.reported = endpoint.addresses.into_iter().collect();
            out.dirty.insert(endpoint.pod.clone());
            out.instances.insert(endpoint.pod, instance);
        }
        out
    }
    pub(crate) fn upsert_namespace(&mut self, namespace: Namespace) {
        self.touch_namespace(&namespace.name);
        self.namespaces.insert(namespace.name.clone(), namespace);
    }
    pub(crate) fn delete_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
        self.touch_namespace(name);
    }
    fn touch_namespace(&mut self, name: &str) {
        let refs = self.instances.keys().filter(|pod| pod.namespace == name).cloned();
        self.dirty.extend(refs);
    }
    pub(crate) fn upsert_pod(&mut self, pod: Pod, identities: &mut Identities, now: u64) {
        let key = (pod.namespace.clone(), pod.name.clone());
        if self.mode == Mode::Kubernetes {
            self.follow_api(&pod, identities, now);
        }
        self.pods.insert(key.clone(), pod);
        self.touch_pod(&key);
    }
    /// In Kubernetes an instance lives exactly as long as its Pod object runs.
    fn follow_api(&mut self, pod: &Pod, identities: &mut Identities, now: u64) {
        let key = (pod.namespace.clone(), pod.name.clone());
        let running = match (&pod.uid, &pod.node) {
            (Some(uid), Some(node)) if !pod.host_network && !pod.finished => Some((uid, node)),
            _ => None,
        };
        for other in self.instances_of(&key) {
            let same = running.is_some_and(|(uid, node)| {
                other.uid == *uid
                    && self
                        .instances
                        .get(&other)
                        .is_some_and(|instance| instance.node == *node)
            });
            if !same {
                self.drop_instance(&other, identities, now);
            }
        }
        if let Some((uid, node)) = running {
            let pod_ref = PodRef {
                namespace: key.0,
                name: key.1,
                uid: uid.clone(),
            };
            let instance = self
                .instances
                .entry(pod_ref)
                .or_insert_with(|| Instance::new(node.clone()));
            instance.status = pod.addresses.iter().copied().collect();
        }
    }
    pub(crate) fn delete_pod(&mut self, key: &(String, String), identities: &mut Identities, now: u64) {
        self.pods.remove(key);
        match self.mode {
            Mode::Kubernetes => {
                for pod in self.instances_of(key) {
                    self.drop_instance(&pod, identities, now);
                }
            }
            Mode::StandAlone => self.touch_pod(key),
        }
    }
    fn touch_pod(&mut self, key: &(String, String)) {
        let refs = self.instances_of(key);
        self.dirty.extend(refs);
    }
    fn instances_of(&self, (namespace, name): &(String, String)) -> Vec<PodRef> {
        let from = PodRef {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: String::new(),
        };
        let range = self.instances.range(from..).map(|(pod, _)| pod);
        range
            .take_while(|pod| pod.namespace == *namespace && pod.name == *name)
            .cloned()
            .collect()
    }
    /// Another incarnation of a node, or none: nothing it reported holds any more.
    pub(crate) fn node_gone(&mut self, node: &NodeName, identities: &mut Identities, now: u64) {
        let of_node: Vec<_> = self
            .instances
            .iter()
            .filter(|(_, i)| i.node == *node)
            .map(|(pod, _)| pod.clone())
            .collect();
        for pod in of_node {
            match self.mode {
                Mode::StandAlone => self.drop_instance(&pod, identities, now),
                Mode::Kubernetes => {
                    if let Some(instance) = self.instances.get_mut(&pod) {
                        instance.reported.clear();
                        instance.released.clear();
                    }
                    self.dirty.insert(pod);
                }
            }
        }
    }
    /// After the first complete view: stored endpoints of nodes that are gone go too.
    pub(crate) fn synced(
        &mut self,
        exists: impl Fn(&NodeName) -> bool,
        identities: &mut Identities,
        now: u64,
    ) {
        let nodes: BTreeSet<_> = self
            .instances
            .values()
            .map(|instance| instance.node.clone())
            .collect();
        for node in nodes.iter().filter(|node| !exists(node)) {
            self.node_gone(node, identities, now);
        }
        self.nodes_changed();
    }
    /// Prefixes of nodes changed: who may have which address is open again.
    pub(crate) fn nodes_changed(&mut self) {
        self.dirty.extend(self.instances.keys().cloned());
    }
    /// CNI DEL on `node`; deleting what is absent is fine. The error is the node on which the pod runs, where that is another.
    pub(crate) fn delete(
        &mut self,
        node: &NodeName,
        pod: &PodRef,
        addresses: &[IpAddr],
        identities: &mut Identities,
        now: u64,
    ) -> Result<(), NodeName> {
        let Some(instance) = self.instances.get(pod) else {
            return Ok(());
        };
        if instance.node != *node {
            return Err(instance.node.clone());
        }
        let all = instance.wanted();
        let given_up: Vec<_> = if addresses.is_empty() {
            all.into_iter().collect()
        } else {
            addresses.to_vec()
        };
        for address in given_up.into_iter().take(MAX_ADDRESSES) {
            self.release(pod, address);
        }
        self.dirty.insert(pod.clone());
        if self.mode == Mode::StandAlone && self.instances.get(pod).is_some_and(|i| i.reported.is_empty()) {
            self.drop_instance(pod, identities, now);
        }
        Ok(())
    }
    fn release(&mut self, pod: &PodRef, address: IpAddr) {
        if let Some(instance) = self.instances.get_mut(pod) {
            instance.reported.remove(&address);
            if instance.status.contains(&address) {
                instance.released.insert(address);
            }
            self.changed.insert(pod.clone());
            self.dirty.insert(pod.clone());
        }
        self.disown(pod, address);
    }
    fn disown(&mut self, pod: &PodRef, address: IpAddr) {
        if self.owners.get(&address) != Some(pod) {
            return;
        }
        self.owners.remove(&address);
        self.touched.insert(address);
        if let Some(instance) = self.instances.get_mut(pod) {
            instance.owned.remove(&address);
            if let Some(addresses) = self.by_node.get_mut(&instance.node) {
                addresses.remove(&address);
            }
        }
        // Somebody may be waiting for exactly this address.
        self.dirty.extend(self.unsettled.keys().cloned());
    }
    fn drop_instance(&mut self, pod: &PodRef, identities: &mut Identities, now: u64) {
        // Not what it wants: it may own what it has just stopped wanting.
        let owned = match self.instances.get(pod) {
            Some(instance) => instance.owned.clone(),
            None => return,
        };
        for address in owned {
            self.disown(pod, address);
        }
        if let Some(instance) = self.instances.remove(pod) {
            identities.release(instance.identity, now);
        }
        self.unsettled.remove(pod);
        self.unnumbered.remove(pod);
        self.dirty.remove(pod);
        self.changed.insert(pod.clone());
    }
    pub(crate) fn identity_of(&self, pod: &PodRef) -> Option<IdentityId> {
        self.instances.get(pod).map(|instance| instance.identity)
    }
    pub(crate) fn workload(&self, address: IpAddr) -> Option<WorkloadRecord> {
        let pod = self.owners.get(&address)?;
        let instance = self.instances.get(pod)?;
        Some(WorkloadRecord {
            ip: address,
            node: instance.node.clone(),
            identity: instance.identity,
            pod: pod.clone(),
            policy_audit: instance.policy_audit,
        })
    }
    /// Addresses owned on a node, sorted.
    pub(crate) fn addresses_of(&self, node: &NodeName) -> impl Iterator<Item = IpAddr> + '_ {
        self.by_node.get(node).into_iter().flatten().copied()
    }
    pub(crate) fn owns_all(&self, pod: &PodRef, addresses: &[IpAddr]) -> bool {
        addresses
            .iter()
            .all(|address| self.owners.get(address) == Some(pod))
    }
    pub(crate) fn take_touched(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.touched)
    }
    pub(crate) fn take_changed(&mut self) -> BTreeSet<PodRef> {
        std::mem::take(&mut self.changed)
    }
    pub(crate) fn stored(&self, pod: &PodRef) -> Option<StoredEndpoint> {
        let instance = self.instances.get(pod)?;
        let addresses = instance.reported.iter().copied().collect();
        Some(StoredEndpoint {
            node: instance.node.clone(),
            pod: pod.clone(),
            addresses,
        })
    }
    pub(crate) fn problems(&self) -> impl Iterator<Item = String> + '_ {
        let unnumbered: BTreeSet<_> = self.unnumbered.values().collect();
        let unnumbered = unnumbered.into_iter().map(ToString::to_string);
        self.unsettled.values().cloned().chain(unnumbered)
    }
}
