//! Cluster-wide settings, the same for `keyd` and every agent (ConfigMap `warren-config`, key
//! `cluster.yaml`; stand-alone: a file of the same content).

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::keys::KEY_SLOTS;

/// Where the directory learns which pod prefixes live on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefixSource {
    /// `spec.podCIDRs` of the Node. A pod address counts only inside its node's prefixes.
    #[default]
    #[serde(rename = "podCIDR")]
    PodCidr,
    /// Each pod's own address, inside `podPools` and not owned by a living pod.
    #[serde(rename = "podIP")]
    PodIp,
}

/// Which datapath an agent uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatapathChoice {
    /// The kernel's WireGuard where it exists, else the tunnel process.
    #[default]
    Auto,
    /// The kernel's WireGuard; an error where it does not exist.
    Kernel,
    /// The tunnel process.
    Userspace,
}

/// Settings of the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterConfig {
    /// Name of the cluster, part of every identity.
    #[serde(default = "default_cluster_name")]
    pub cluster_name: String,
    /// `false` only for comparisons: traffic then leaves in clear.
    #[serde(default = "yes")]
    pub encryption: bool,
    /// All addresses that pods may have, both families. Required: the barrier rests on it.
    pub pod_pools: Vec<IpNet>,
    /// All addresses that nodes may have, both families.
    pub node_pools: Vec<IpNet>,
    /// Service CIDRs; no prefix may overlap them.
    #[serde(default)]
    pub service_cidrs: Vec<IpNet>,
    /// Where pod prefixes come from.
    #[serde(default)]
    pub prefix_source: PrefixSource,
    /// Which datapath agents use.
    #[serde(default)]
    pub datapath: DatapathChoice,
    /// The first of four UDP ports, one per slot.
    #[serde(default = "default_port")]
    pub wireguard_port: u16,
    /// TCP port of `keyd` for agents.
    #[serde(default = "default_keyd_port")]
    pub keyd_port: u16,
    /// TCP port of the API server on its nodes: host traffic to it is exempt from the tunnel.
    #[serde(default = "default_apiserver_port")]
    pub apiserver_port: u16,
    /// Persistent keepalive, seconds; 0 turns it off.
    #[serde(default = "default_keepalive")]
    pub keepalive_seconds: u16,
    /// Whether new WireGuard keys come with pre-shared keys: each pair of nodes agrees on one by ML-KEM-768 and X25519 inside
    /// a tunnel. A change takes effect with the next rotation.
    #[serde(default = "yes")]
    pub pre_shared_keys: bool,
    /// The bits of the packet mark that are Warren's; at least 13 bits.
    #[serde(default = "default_mark_mask")]
    pub mark_mask: u32,
    /// NodePorts of the API server (`--service-node-port-range`), first and last.
    #[serde(default = "default_node_ports")]
    pub node_ports: (u16, u16),
    /// Whether a node's host reaches its own pods whatever policies say (the kubelet's probes).
    #[serde(default = "yes")]
    pub host_reaches_pods: bool,
    /// Audit mode for the whole cluster: policy is computed and reported, nothing is dropped by it.
    #[serde(default)]
    pub policy_audit: bool,
    /// Whether the annotation `warren.dev/policy-audit` of a Pod counts. Whoever may annotate a pod could then take it
    /// out of policy: so only where an operator says so.
    #[serde(default)]
    pub pods_may_audit: bool,
    /// Labels of pods that are no part of an identity: keys, or their beginnings with `*` behind. Labels that differ from
    /// pod to pod, or from revision to revision, would make an identity of each.
    #[serde(default = "default_ignored_labels")]
    pub ignored_labels: Vec<String>,
    /// The most identities that the pods of one namespace may have; pods with further label sets stay closed.
    #[serde(default = "default_identities_per_namespace")]
    pub identities_per_namespace: u32,
    /// How long a snapshot is good, seconds.
    #[serde(default = "default_expiry")]
    pub snapshot_expiry_seconds: u64,
    /// Whether a node that has heard nothing for so long cuts its pods off from those of other nodes, instead of keeping the
    /// peers that it has.
    #[serde(default)]
    pub snapshot_hard_fail: bool,
    /// After how long `keyd` replaces the key that signs snapshots, seconds; 0: only when it is asked to.
    #[serde(default = "default_signing_key_max_age")]
    pub signing_key_max_age_seconds: u64,
}

fn yes() -> bool {
    true
}
fn default_cluster_name() -> String {
    "default".into()
}
fn default_port() -> u16 {
    51871
}
fn default_keyd_port() -> u16 {
    4250
}
fn default_apiserver_port() -> u16 {
    6443
}
fn default_keepalive() -> u16 {
    25
}
fn default_mark_mask() -> u32 {
    0x3f7f
}
fn default_node_ports() -> (u16, u16) {
    (30_000, 32_767)
}
/// What controllers of Kubernetes write, with another value per replica, revision or run.
pub fn default_ignored_labels() -> Vec<String> {
    [
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/*",
        "controller-revision-hash",
        "controller-uid",
        "job-name",
        "pod-template-generation",
        "pod-template-hash",
        "statefulset.kubernetes.io/pod-name",
    ]
    .map(str::to_owned)
    .into()
}
/// An eighth of all numbers.
pub fn default_identities_per_namespace() -> u32 {
    8192
}
fn default_expiry() -> u64 {
    24 * 3600
}
fn default_signing_key_max_age() -> u64 {
    90 * 24 * 3600
}

impl ClusterConfig {
    /// Checks what the types cannot; the sentence says what is wrong and what to do.
    pub fn validate(&self) -> Result<(), String> {
        if self.pod_pools.is_empty() {
            return Err("podPools is empty: list the prefixes that pods get their addresses from".into());
        }
        if self.node_pools.is_empty() {
            return Err("nodePools is empty: list the prefixes that nodes have their addresses in".into());
        }
        for prefix in self
            .pod_pools
            .iter()
            .chain(&self.node_pools)
            .chain(&self.service_cidrs)
        {
            if prefix.prefix_len() == 0 {
                return Err(format!("{prefix} is a default route: name the real prefixes"));
            }
            if prefix.trunc() != *prefix {
                return Err(format!(
                    "{prefix} has bits set after its length: write {}",
                    prefix.trunc()
                ));
            }
        }
        for pod in &self.pod_pools {
            for other in self.node_pools.iter().chain(&self.service_cidrs) {
                if pod.contains(other) || other.contains(pod) {
                    return Err(format!(
                        "pod pool {pod} overlaps {other}: pods, nodes and services need disjoint prefixes"
                    ));
                }
            }
        }
        if self.mark_mask.count_ones() < 13 {
            return Err(format!("markMask {:#x} has fewer than 13 bits", self.mark_mask));
        }
        if self.identities_per_namespace == 0 {
            return Err("identitiesPerNamespace is 0: no pod could have an identity".into());
        }
        if let Some(bad) = self.ignored_labels.iter().find(|label| {
            let name = label.strip_suffix('*').unwrap_or(label);
            name.is_empty() || name.contains('*')
        }) {
            return Err(format!(
                "ignoredLabels has {bad:?}: write a label's key, or its beginning and one `*`"
            ));
        }
        if self.wireguard_port > u16::MAX - u16::from(KEY_SLOTS - 1) {
            return Err("wireguardPort leaves no room for the four slots".into());
        }
        Ok(())
    }

    /// Whether a label of this key is no part of an identity.
    pub fn ignores_label(&self, key: &str) -> bool {
        self.ignored_labels
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(beginning) => key.starts_with(beginning),
                None => key == pattern,
            })
    }

    /// The UDP port of a slot.
    pub fn slot_port(&self, slot: u8) -> u16 {
        self.wireguard_port + u16::from(slot)
    }
}
