//! Kubernetes objects -> the core's plain structs. The only place where names from objects enter.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::{
    api::{
        core::v1::{Container, Namespace as KubeNamespace, Node as KubeNode, Pod as KubePod},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use warren_keyd_core::{Namespace, Node, Pod};
use warren_model::policy::{NamedPorts, Protocol};

/// The annotation that a kubelet puts on the mirror of a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// The annotation that puts a node or a pod into audit mode.
const AUDIT: &str = "warren.dev/policy-audit";

/// One sentence without its subject.
pub(crate) type Fault = String;

/// A name as RFC 1123 has it (the API server's rule; a manifest folder has no API server). Names stand in file
/// names and certificates.
pub(crate) fn valid_name(name: &str) -> Result<(), Fault> {
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !label.is_empty() && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    // The common name of a certificate has room for 64 characters (RFC 5280 appendix A.1).
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(format!(
        "the name {name:?} is not lower-case letters, digits, dashes and dots"
    ))
}

fn name_of(metadata: &ObjectMeta) -> Result<String, Fault> {
    let name = metadata.name.clone().ok_or("metadata.name is missing")?;
    valid_name(&name)?;
    Ok(name)
}

fn labels_of(metadata: &ObjectMeta) -> BTreeMap<String, String> {
    metadata.labels.clone().unwrap_or_default().into_iter().collect()
}

/// A Node. `derived_uid` is used where the object has none.
pub(crate) fn node(node: &KubeNode, derived_uid: impl Fn(&str) -> String) -> Result<Node, Fault> {
    let name = name_of(&node.metadata)?;
    let spec = node.spec.clone().unwrap_or_default();
    let mut cidrs: Vec<String> = spec.pod_cidrs.unwrap_or_default().into_iter().collect();
    if let Some(cidr) = spec.pod_cidr.filter(|cidr| !cidrs.contains(cidr)) {
        cidrs.insert(0, cidr);
    }
    let mut pod_cidrs = vec![];
    for cidr in cidrs {
        let prefix: ipnet::IpNet = cidr
            .parse()
            .map_err(|_| format!("podCIDR {cidr:?} is not a prefix"))?;
        if prefix.trunc() != prefix {
            return Err(format!(
                "podCIDR {cidr} has bits set after its length: write {}",
                prefix.trunc()
            ));
        }
        pod_cidrs.push(prefix);
    }
    let mut addresses: Vec<IpAddr> = vec![];
    for address in node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten())
    {
        if address.type_ == "InternalIP" {
            let text = &address.address;
            let ip = text
                .parse()
                .map_err(|_| format!("InternalIP {text:?} is not an address"))?;
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
    }
    let (uid, uid_derived) = match node.metadata.uid.clone().filter(|uid| !uid.is_empty()) {
        Some(uid) => (uid, false),
        None => (derived_uid(&name), true),
    };
    if uid.is_empty() || uid.len() > 128 || !uid.chars().all(|c| c.is_ascii_graphic()) {
        return Err("metadata.uid is empty, has more than 128 characters or unprintable ones".into());
    }
    Ok(Node {
        name: name.into(),
        uid: uid.into(),
        uid_derived,
        addresses,
        pod_cidrs,
        labels: labels_of(&node.metadata),
        policy_audit: audit(&node.metadata),
    })
}

/// A Namespace.
pub(crate) fn namespace(namespace: &KubeNamespace) -> Result<Namespace, Fault> {
    Ok(Namespace {
        name: name_of(&namespace.metadata)?,
        labels: labels_of(&namespace.metadata),
    })
}

/// A Pod.
pub(crate) fn pod(pod: &KubePod) -> Result<Pod, Fault> {
    let metadata = &pod.metadata;
    let name = name_of(metadata)?;
    let namespace = metadata.namespace.clone().unwrap_or_else(|| "default".into());
    valid_name(&namespace)?;
    let spec = pod.spec.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let mut addresses = vec![];
    let single = status.pod_ip.clone().filter(|ip| !ip.is_empty());
    let many = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone());
    for text in many.chain(single) {
        let ip = text
            .parse()
            .map_err(|_| format!("podIP {text:?} is not an address"))?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let phase = status.phase.unwrap_or_default();
    Ok(Pod {
        namespace,
        name,
        uid: metadata.uid.clone().filter(|uid| !uid.is_empty()),
        node: spec.node_name.filter(|node| !node.is_empty()).map(Into::into),
        labels: labels_of(metadata),
        service_account: spec.service_account_name.unwrap_or_default(),
        host_network: spec.host_network.unwrap_or(false),
        mirror: metadata
            .annotations
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key(MIRROR)),
        finished: phase == "Succeeded" || phase == "Failed",
        addresses,
        ports: named_ports(
            &spec.containers,
            spec.init_containers.as_deref().unwrap_or_default(),
        ),
        policy_audit: audit(metadata),
    })
}

fn audit(metadata: &ObjectMeta) -> bool {
    let annotation = metadata.annotations.as_ref().and_then(|all| all.get(AUDIT));
    annotation.is_some_and(|value| value == "true")
}

/// The named ports of containers, and of init containers that go on running. The first of a name counts, as it does for
/// Services. What the API server would not have taken is left out.
fn named_ports(containers: &[Container], init: &[Container]) -> NamedPorts {
    let sidecars = init
        .iter()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut ports = NamedPorts::default();
    for port in containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
    {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(_) => continue,
        };
        if let Some(name) = port.name.clone().filter(|name| !name.is_empty())
            && let Ok(number @ 1..) = u16::try_from(port.container_port)
        {
            ports.0.entry(name).or_insert((protocol, number));
        }
    }
    ports
}

/// The addresses of an EndpointSlice.
pub(crate) fn slice_addresses(slice: &EndpointSlice) -> Result<BTreeSet<IpAddr>, Fault> {
    let texts = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
    texts
        .map(|text| {
            text.parse()
                .map_err(|_| format!("endpoint {text:?} is not an address"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        for bad in [
            "",
            "../x",
            "a/b",
            "A",
            "a_b",
            ".a",
            "a.",
            "-a",
            "a b",
            &"a".repeat(254),
        ] {
            assert!(valid_name(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "node-1", "node1.example.org"] {
            assert!(valid_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn nodes_take_internal_addresses_and_both_pod_cidr_fields() {
        let object = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node1"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "node1"},
                {"type": "InternalIP", "address": "172.30.0.1"},
                {"type": "ExternalIP", "address": "8.8.8.8"},
                {"type": "InternalIP", "address": "fd00::1"}
            ]}
        }))
        .unwrap();
        let node = node(&object, |name| format!("derived-{name}")).unwrap();
        assert_eq!(node.pod_cidrs.len(), 2);
        assert_eq!(
            node.addresses,
            [
                "172.30.0.1".parse::<IpAddr>().unwrap(),
                "fd00::1".parse().unwrap()
            ]
        );
        assert_eq!((node.uid.as_str(), node.uid_derived), ("derived-node1", true));
    }

    #[test]
    fn mirror_host_network_and_finished_pods_are_told_apart() {
        let object = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "annotations": {MIRROR: "x", AUDIT: "yes"}},
            "spec": {"containers": [], "nodeName": "node1", "hostNetwork": true, "serviceAccountName": "sa"},
            "status": {"phase": "Failed", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::9"}]}
        }))
        .unwrap();
        let pod = pod(&object).unwrap();
        assert!(pod.mirror && pod.host_network && pod.finished && !pod.policy_audit);
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.service_account, "sa");
    }

    #[test]
    fn named_ports_and_audit_mode_are_read() {
        let port = |name: &str, number: i32, protocol: &str| serde_json::json!({"name": name, "containerPort": number, "protocol": protocol});
        let object = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "annotations": {AUDIT: "true"}},
            "spec": {
                "containers": [
                    {"name": "a", "ports": [{"containerPort": 1}, {"name": "web", "containerPort": 8080}]},
                    {"name": "b", "ports": [port("web", 81, "TCP"), port("dns", 53, "UDP")]},
                    {"name": "c", "ports": [port("sig", 2905, "SCTP"), port("odd", 1, "DCCP")]}
                ],
                "initContainers": [
                    {"name": "d", "ports": [port("once", 1, "TCP")]},
                    {"name": "e", "restartPolicy": "Always", "ports": [port("proxy", 15001, "TCP")]}
                ]
            }
        }))
        .unwrap();
        let pod = pod(&object).unwrap();
        assert!(pod.policy_audit);
        let ports: Vec<_> = pod
            .ports
            .labels()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        assert_eq!(
            ports,
            [
                "port:dns=UDP/53",
                "port:proxy=TCP/15001",
                "port:sig=SCTP/2905",
                "port:web=TCP/8080"
            ]
        );
    }
}
