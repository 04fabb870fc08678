//! Which endpoint a node may report.

use std::net::IpAddr;

use warren_model::{NodeName, NodeRecord, PodRef, PrefixSource};

use super::{Endpoints, Instance, MAX_ADDRESSES};
use crate::event::{EndpointError, Mode};

impl Endpoints {
    /// CNI ADD on `node`.
    pub(crate) fn add(
        &mut self,
        node: &NodeRecord,
        pod: &PodRef,
        addresses: &[IpAddr],
    ) -> Result<(), EndpointError> {
        let refuse = |message: String, retry| Err(EndpointError { message, retry });
        if pod.namespace.is_empty() || pod.name.is_empty() || pod.uid.is_empty() {
            return refuse("the pod's namespace, name or UID is empty".into(), false);
        }
        if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
            return refuse(
                format!(
                    "pod {pod} has {} addresses: 1 to {MAX_ADDRESSES} are expected",
                    addresses.len()
                ),
                false,
            );
        }
        self.may_run(&node.name, pod)?;
        for address in addresses {
            if let Err(message) = self.admissible(*address, node) {
                return refuse(format!("pod {pod}: {message}"), false);
            }
            match self.owners.get(address).filter(|owner| *owner != pod) {
                Some(owner)
                    if self
                        .instances
                        .get(owner)
                        .is_some_and(|other| other.node != node.name) =>
                {
                    return refuse(
                        format!("address {address} belongs to the living pod {owner} on another node"),
                        true,
                    );
                }
                _ => {}
            }
        }
        for address in addresses {
            // The node gives its addresses out: a newer ADD there means that the older pod is done with it.
            if let Some(older) = self.owners.get(address).filter(|owner| *owner != pod).cloned() {
                self.release(&older, *address);
            }
        }
        let instance = self
            .instances
            .entry(pod.clone())
            .or_insert_with(|| Instance::new(node.name.clone()));
        for address in addresses {
            instance.reported.insert(*address);
            instance.released.remove(address);
        }
        self.dirty.insert(pod.clone());
        self.changed.insert(pod.clone());
        Ok(())
    }
    /// Whether the labels of a namespace are known. A folder of manifests need not have Namespaces.
    pub(super) fn knows_namespace(&self, name: &str) -> bool {
        self.mode == Mode::StandAlone || self.namespaces.contains_key(name)
    }
    /// Whether this pod may run on this node at all.
    pub(super) fn may_run(&self, node: &NodeName, pod: &PodRef) -> Result<(), EndpointError> {
        let refuse = |message: String, retry| Err(EndpointError { message, retry });
        let key = (pod.namespace.clone(), pod.name.clone());
        let known = self.pods.get(&key);
        if let Some(other) = self.instances_of(&key).into_iter().find(|other| {
            (self.mode == Mode::StandAlone || other.uid == pod.uid) && self.instances[other].node != *node
        }) {
            let home = &self.instances[&other].node;
            return refuse(format!("pod {pod} already runs on node {home}"), true);
        }
        match (self.mode, known) {
            (Mode::Kubernetes, None) => refuse(format!("pod {pod} is not known yet"), true),
            (Mode::StandAlone, None) => Ok(()),
            (_, Some(known)) => {
                let uid_differs = known.uid.as_ref().is_some_and(|uid| *uid != pod.uid);
                match &known.node {
                    Some(home) if home != node => refuse(
                        format!("pod {pod} is scheduled on node {home}, not on {node}"),
                        false,
                    ),
                    None if self.mode == Mode::Kubernetes => {
                        refuse(format!("pod {pod} is not scheduled yet"), true)
                    }
                    _ if !self.knows_namespace(&known.namespace) => {
                        refuse(format!("namespace {} is not known yet", known.namespace), true)
                    }
                    _ if uid_differs => refuse(format!("pod {pod} has another UID than {}", pod.uid), true),
                    _ if known.host_network => refuse(
                        format!("pod {pod} uses the host's network: it has no endpoint"),
                        false,
                    ),
                    _ if known.finished && self.mode == Mode::Kubernetes => {
                        refuse(format!("pod {pod} has finished"), false)
                    }
                    _ => Ok(()),
                }
            }
        }
    }
    /// Whether any pod of this node may have this address.
    pub(super) fn admissible(&self, address: IpAddr, node: &NodeRecord) -> Result<(), String> {
        match self.config.prefix_source {
            PrefixSource::PodCidr if node.prefixes.iter().any(|prefix| prefix.contains(&address)) => Ok(()),
            PrefixSource::PodCidr => Err(format!(
                "address {address} is not inside the podCIDRs of node {}",
                node.name
            )),
            PrefixSource::PodIp => {
                let inside = |list: &[ipnet::IpNet]| list.iter().any(|prefix| prefix.contains(&address));
                if !inside(&self.config.pod_pools) {
                    return Err(format!("address {address} lies outside podPools"));
                }
                if inside(&self.config.node_pools) || inside(&self.config.service_cidrs) {
                    return Err(format!("address {address} is reserved for nodes or services"));
                }
                Ok(())
            }
        }
    }
}
