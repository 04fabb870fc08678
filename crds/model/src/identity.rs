//! Workload identities.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// A numeric identity. Numbers below 256 are reserved and are Cilium's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdentityId(pub u32);

impl IdentityId {
    /// No identity known: matches no selector.
    pub const UNKNOWN: Self = Self(0);
    /// The node itself.
    pub const HOST: Self = Self(1);
    /// Everything outside the cluster.
    pub const WORLD: Self = Self(2);
    /// A pod that Warren does not manage (mirror pods among them).
    pub const UNMANAGED: Self = Self(3);
    /// Health probes.
    pub const HEALTH: Self = Self(4);
    /// A pod whose labels are not known yet.
    pub const INIT: Self = Self(5);
    /// Another node of the mesh.
    pub const REMOTE_NODE: Self = Self(6);
    /// A node that runs the API server.
    pub const KUBE_APISERVER: Self = Self(7);
    /// Ingress proxies.
    pub const INGRESS: Self = Self(8);
    /// Outside the cluster, IPv4.
    pub const WORLD_IPV4: Self = Self(9);
    /// Outside the cluster, IPv6.
    pub const WORLD_IPV6: Self = Self(10);
    /// The first number that is allocated to workloads.
    pub const FIRST_ALLOCATED: Self = Self(256);
    /// The last number that is allocated to workloads.
    pub const LAST_ALLOCATED: Self = Self(65_535 + 256);

    /// The `reserved:` name of a reserved identity.
    pub fn reserved_name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "unknown",
            1 => "host",
            2 => "world",
            3 => "unmanaged",
            4 => "health",
            5 => "init",
            6 => "remote-node",
            7 => "kube-apiserver",
            8 => "ingress",
            9 => "world-ipv4",
            10 => "world-ipv6",
            _ => return None,
        })
    }
}

impl fmt::Display for IdentityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Policy-relevant labels of a workload, keys with their source prefix (`k8s:app`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Labels(pub BTreeMap<String, String>);

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, value)) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{key}={value}")?;
        }
        Ok(())
    }
}
