//! Which labels make an identity (policy semantics: Cilium's names).

use std::collections::BTreeMap;

use warren_model::{
    ClusterConfig, Labels,
    policy::keys::{CLUSTER, NAMESPACE, NAMESPACE_LABELS, SERVICE_ACCOUNT},
};

use crate::event::{Namespace, Pod};

/// Labels of pods that imitate ours are dropped.
const RESERVED_PREFIXES: [&str; 2] = ["io.cilium.k8s.", "reserved:"];
/// Set on each Namespace by the API server; added where a manifest lacks it.
const METADATA_NAME: &str = "kubernetes.io/metadata.name";

/// The policy-relevant labels of a pod, keys with their source prefix, and its named ports. A pod's own labels never
/// override the namespace, the namespace's labels, the service account or the cluster.
pub fn workload_labels(pod: &Pod, namespace: Option<&Namespace>, config: &ClusterConfig) -> Labels {
    let mut labels: BTreeMap<_, _> = pod.ports.labels().collect();
    let mut put = |key: String, value: &str| labels.insert(format!("k8s:{key}"), value.to_owned());
    for (key, value) in &pod.labels {
        let imitation = key == NAMESPACE || RESERVED_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
        if !imitation && !config.ignores_label(key) {
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
    put(CLUSTER.into(), &config.cluster_name);
    Labels(labels)
}

#[cfg(test)]
mod tests {
    use warren_model::policy::{NamedPorts, Protocol};

    use super::*;
    use crate::core::tests::config;

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
        let labels = workload_labels(&pod(&[("app", "web")]), Some(&namespace), &config());
        assert_eq!(
            labels.to_string(),
            "k8s:app=web,k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop,\
             k8s:io.cilium.k8s.namespace.labels.team=a,k8s:io.cilium.k8s.policy.cluster=test,\
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
            workload_labels(&liar, None, &config()),
            workload_labels(&pod(&[]), None, &config())
        );
    }

    #[test]
    fn replicas_share_an_identity() {
        let replica = pod(&[
            ("app", "web"),
            ("pod-template-hash", "7d9f"),
            ("apps.kubernetes.io/pod-index", "3"),
            ("batch.kubernetes.io/job-completion-index", "7"),
            ("batch.kubernetes.io/controller-uid", "u"),
            ("job-name", "nightly-28"),
        ]);
        assert_eq!(
            workload_labels(&replica, None, &config()),
            workload_labels(&pod(&[("app", "web")]), None, &config())
        );
    }

    #[test]
    fn which_labels_are_ignored_is_configuration() {
        let lenient = ClusterConfig {
            ignored_labels: vec!["build/*".into(), "commit".into()],
            ..config()
        };
        let of = |labels: &[(&str, &str)]| workload_labels(&pod(labels), None, &lenient);
        let many = [("app", "web"), ("build/number", "1"), ("commit", "c0ffee")];
        assert_eq!(of(&many), of(&[("app", "web")]));
        assert_ne!(of(&[("commits", "1")]), of(&[]));
        assert_ne!(of(&[("pod-template-hash", "7d9f")]), of(&[]));
    }

    #[test]
    fn named_ports_are_part_of_the_identity_and_no_label_can_imitate_them() {
        let mut server = pod(&[("app", "web")]);
        server.ports = NamedPorts([("http".to_owned(), (Protocol::Tcp, 8080))].into());
        let labels = workload_labels(&server, None, &config());
        assert_eq!(NamedPorts::of(&labels), server.ports);
        let liar = pod(&[("port:http", "TCP/22"), ("http", "TCP/22")]);
        assert_eq!(
            NamedPorts::of(&workload_labels(&liar, None, &config())),
            NamedPorts::default()
        );
    }
}
