//! Pods and their addresses.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{identity::IdentityId, node::NodeName};

/// Which pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRef {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the Pod object; stand-alone, the sandbox's container id where the manifest names none.
    pub uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which pod owns an address, where it lives and who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadRecord {
    /// The pod's address; a pod has a record per address.
    pub ip: IpAddr,
    /// The node it runs on.
    pub node: NodeName,
    /// Its identity.
    pub identity: IdentityId,
    /// The pod.
    pub pod: PodRef,
    /// Audit mode for this pod: policy is reported, not enforced.
    #[serde(default)]
    pub policy_audit: bool,
}
