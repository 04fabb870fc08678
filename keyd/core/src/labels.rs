//! Which labels make an identity (policy semantics: Cilium's names).

use std::collections::BTreeMap;

use warren_model::Labels;

use crate::event::{Namespace, Pod};

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";
/// Labels of pods that imitate ours are dropped.
const RESERVED_PREFIXES: [&str; 2] = ["io.cilium.k8s.", "reserved:"];
/// Set on each Namespace by the API server; added where a manifest lacks it.
const METADATA_NAME: &str = "kubernetes.io/metadata.name";

/// Labels that controllers write with another value per revision or replica: each would make an identity of its
/// own, and no policy means them.
const PER_REPLICA: [&str; 8] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "controller-uid",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
];

/// The policy-relevant labels of a pod, keys with their source prefix. A pod's own labels never override the
/// namespace, the namespace's labels, the service account or the cluster.
pub fn workload_labels(pod: &Pod, namespace: Option<&Namespace>, cluster: &str) -> Labels {
    let mut labels = BTreeMap::new();
    let mut put = |key: String, value: &str| labels.insert(format!("k8s:{key}"), value.to_owned());
    for (key, value) in &pod.labels {
        let imitation = key == NAMESPACE || RESERVED_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
        if !imitation && !PER_REPLICA.contains(&key.as_str()) {
            put(key.clone(), value);
        }
    }
    for (key, value) in namespace.iter().flat_map(|namespace| &namespace.labels) {
        put(format!("{NAMESPACE_LABELS}{key}"), value);
    }
    put(format!("{NAMESPACE_LABELS}{METADATA_NAME}"), &pod.namespace);
    put(NAMESPACE.into(), &pod.namespace);
    let account = if pod.service_account.is_empty() {
        "default"
    } else {
        &pod.service_account
    };
    put(SERVICE_ACCOUNT.into(), account);
    put(CLUSTER.into(), cluster);
    Labels(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(labels: &[(&str, &str)]) -> Pod {
        Pod {
            namespace: "shop".into(),
            name: "web-0".into(),
            labels: labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            ..Pod::default()
        }
    }

    #[test]
    fn labels_carry_their_source_and_the_surroundings() {
        let namespace = Namespace {
            name: "shop".into(),
            labels: [("team".into(), "a".into())].into(),
        };
        let labels = workload_labels(&pod(&[("app", "web")]), Some(&namespace), "east");
        assert_eq!(
            labels.to_string(),
            "k8s:app=web,k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop,\
             k8s:io.cilium.k8s.namespace.labels.team=a,k8s:io.cilium.k8s.policy.cluster=east,\
             k8s:io.cilium.k8s.policy.serviceaccount=default,k8s:io.kubernetes.pod.namespace=shop"
        );
    }

    #[test]
    fn a_pod_cannot_imitate_reserved_labels() {
        let liar = pod(&[
            ("io.kubernetes.pod.namespace", "kube-system"),
            ("io.cilium.k8s.policy.serviceaccount", "admin"),
            ("io.cilium.k8s.policy.cluster", "west"),
            ("io.cilium.k8s.namespace.labels.team", "root"),
            (
                "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
                "kube-system",
            ),
        ]);
        assert_eq!(
            workload_labels(&liar, None, "east"),
            workload_labels(&pod(&[]), None, "east")
        );
    }

    #[test]
    fn replicas_share_an_identity() {
        let replica = pod(&[
            ("app", "web"),
            ("pod-template-hash", "7d9f"),
            ("apps.kubernetes.io/pod-index", "3"),
        ]);
        assert_eq!(
            workload_labels(&replica, None, "east"),
            workload_labels(&pod(&[("app", "web")]), None, "east")
        );
    }
}
