//! Configuration files of the Kubernetes components.

use std::path::Path;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::address::{self, Families};

/// containerd's own format.
pub(super) fn containerd() -> String {
    r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.opt",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/warren/pause:dev"
  # Root without CAP_SYS_RESOURCE cannot lower its OOM score, and runc gives up when it fails.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#
    .into()
}

/// The network of a node's pods before Warren is chained to it.
pub(super) fn cni(bridge: bool, cidrs: &[IpNet]) -> Value {
    let ranges: Vec<Value> = cidrs.iter().map(|cidr| json!([{"subnet": cidr}])).collect();
    let ipam = json!({
        "type": "host-local",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    let main = if bridge {
        json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": ipam})
    } else {
        json!({"type": "ptp", "ipam": ipam})
    };
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [main, {"type": "portmap", "capabilities": {"portMappings": true}}],
    })
}

/// kubelet's; `pki` and `resolv` are paths inside the node.
pub(super) fn kubelet(node: &str, pki: &Path, resolv: &Path, families: Families) -> Value {
    let certificate = |suffix: &str| pki.join(format!("{node}-server.{suffix}"));
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.join("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": certificate("crt"),
        "tlsPrivateKeyFile": certificate("key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDNS": families.order(address::CLUSTER_DNS),
        "clusterDomain": "cluster.local",
        "resolvConf": resolv,
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "200Mi", "imagefs.available": "200Mi", "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        // See `restrict_oom_score_adj`.
        "oomScoreAdj": 0,
        "maxPods": 60,
    })
}

/// How kube-proxy does its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    /// With nftables.
    Nftables,
    /// With iptables.
    Iptables,
}

/// kube-proxy's. The conntrack table's size is not writable in a child network namespace: 0 leaves it alone.
pub(super) fn kube_proxy(node: &str, kubeconfig: &Path, mode: ProxyMode, families: Families) -> Value {
    let pods = families
        .order(crate::lab::net::pod_pools())
        .map(|pool| pool.to_string());
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": match mode {
            ProxyMode::Nftables => "nftables",
            ProxyMode::Iptables => "iptables",
        },
        "oomScoreAdj": 0,
        "hostnameOverride": node,
        "clusterCIDR": pods.join(","),
        "clientConnection": {"kubeconfig": kubeconfig},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "metricsBindAddress": "127.0.0.1:10249",
        "healthzBindAddress": "0.0.0.0:10256",
    })
}
