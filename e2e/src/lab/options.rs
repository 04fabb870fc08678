//! What lab to build.

use warren_model::{ClusterConfig, DatapathChoice, PrefixSource};

use super::{cni::MainPlugin, net};

/// Chooses the datapath of labs that do not name one: `auto`, `kernel` or `userspace` (the default).
pub const DATAPATH_VARIABLE: &str = "WARREN_LAB_DATAPATH";

/// What lab to build.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Number of nodes: `node1`, `node2`, ...
    pub nodes: u8,
    /// `false` is the power check: the same lab, traffic in clear.
    pub encryption: bool,
    /// Where pod prefixes come from.
    pub prefix_source: PrefixSource,
    /// What moves the nodes' packets.
    pub datapath: DatapathChoice,
    /// Run `keyd` and the agents, and chain `warren-cni`. Without, the lab is a plain routed cluster.
    pub warren: bool,
    /// The plugin of node 1, 2, ...; repeated when there are more nodes. `podIP` labs always use `ptp`.
    pub plugins: Vec<MainPlugin>,
    /// `keyd`, the agents and their tunnels log everything that they can.
    pub verbose: bool,
    /// `keyd`, the agents and their tunnels have a wall clock of their own on each node ([`super::Node::set_clock`]).
    pub clocks: bool,
    /// Changes to the cluster's configuration before it is written.
    pub tune: fn(&mut ClusterConfig),
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            nodes: 3,
            encryption: true,
            prefix_source: PrefixSource::PodCidr,
            datapath: datapath_from_environment(),
            warren: true,
            plugins: vec![MainPlugin::Ptp, MainPlugin::Bridge],
            verbose: false,
            clocks: false,
            tune: |_| {},
        }
    }
}

/// # Panics
/// Where the variable holds anything else: a lab on another datapath than the asked one proves nothing.
fn datapath_from_environment() -> DatapathChoice {
    let value = std::env::var_os(DATAPATH_VARIABLE).unwrap_or_else(|| "userspace".into());
    match value.to_str() {
        Some("auto") => DatapathChoice::Auto,
        Some("kernel") => DatapathChoice::Kernel,
        Some("userspace") => DatapathChoice::Userspace,
        _ => panic!("{DATAPATH_VARIABLE} is {value:?}: use auto, kernel or userspace"),
    }
}

impl LabOptions {
    /// The cluster's configuration in such a lab.
    pub(super) fn cluster_config(&self) -> ClusterConfig {
        let options = self;
        let mut config = ClusterConfig {
            cluster_name: "lab".into(),
            encryption: options.encryption,
            pod_pools: net::pod_pools().to_vec(),
            node_pools: net::node_pools().to_vec(),
            service_cidrs: net::service_pools().to_vec(),
            prefix_source: options.prefix_source,
            datapath: options.datapath,
            wireguard_port: 51871,
            keyd_port: 4250,
            apiserver_port: 6443,
            keepalive_seconds: 25,
            pre_shared_keys: true,
            mark_mask: 0x3f7f,
            node_ports: (30_000, 32_767),
            host_reaches_pods: true,
            policy_audit: false,
            pods_may_audit: true,
            ignored_labels: warren_model::config::default_ignored_labels(),
            identities_per_namespace: warren_model::config::default_identities_per_namespace(),
            snapshot_expiry_seconds: 24 * 3600,
            snapshot_hard_fail: false,
            signing_key_max_age_seconds: 0,
        };
        (options.tune)(&mut config);
        config
    }
}
