//! `apply(event)`, expect outputs.

use warren_model::ClusterConfig;

pub(crate) fn config() -> ClusterConfig {
    ClusterConfig {
        cluster_name: "test".into(),
        encryption: true,
        pod_pools: vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/48".parse().unwrap(),
        ],
        node_pools: vec!["172.30.0.0/24".parse().unwrap(), "fd00:30::/64".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        prefix_source: Default::default(),
        datapath: Default::default(),
        wireguard_port: 51871,
        keyd_port: 4250,
        apiserver_port: 6443,
        keepalive_seconds: 25,
        mark_mask: 0x3f7f,
        snapshot_expiry_seconds: 86400,
    }
}
