//! Labels with sources, and selectors over them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::identity::{IdentityId, Labels};

/// Names of the labels that Warren sets itself, without their source (`k8s:`). A pod's own label of such a name
/// never gets into its identity.
pub mod keys {
    /// The namespace of a pod.
    pub const NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// The service account of a pod.
    pub const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
    /// The name of the cluster.
    pub const CLUSTER: &str = "io.cilium.k8s.policy.cluster";
    /// What the labels of a pod's namespace start with.
    pub const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
    /// The source of labels that carry a pod's named ports (`port:http` = `TCP/8080`), with its colon. A key without a
    /// source never means them.
    pub const PORT_SOURCE: &str = "port:";
}

/// Who gave a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LabelSource {
    /// Any source that tells who a workload is: a key without a prefix, or with `any:`. Not `port:`.
    Any,
    /// Kubernetes: pod, namespace, service account, cluster.
    K8s,
    /// Warren: `reserved:host` and the like.
    Reserved,
    /// An address's prefix.
    Cidr,
    /// A DNS name.
    Fqdn,
    /// Any other; no identity has such labels.
    Other(String),
}

impl LabelSource {
    fn prefix(&self) -> &str {
        match self {
            Self::Any => "any",
            Self::K8s => "k8s",
            Self::Reserved => "reserved",
            Self::Cidr => "cidr",
            Self::Fqdn => "fqdn",
            Self::Other(name) => name,
        }
    }
}

/// A label's key with its source.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LabelKey {
    /// The source.
    pub source: LabelSource,
    /// The name.
    pub name: String,
}

impl LabelKey {
    /// Reads `k8s:app`, `reserved:host` or `app`: the source is what stands before the first colon.
    pub fn parse(text: &str) -> Self {
        let (source, name) = match text.split_once(':') {
            None => (LabelSource::Any, text),
            Some(("any", name)) => (LabelSource::Any, name),
            Some(("k8s", name)) => (LabelSource::K8s, name),
            Some(("reserved", name)) => (LabelSource::Reserved, name),
            Some(("cidr", name)) => (LabelSource::Cidr, name),
            Some(("fqdn", name)) => (LabelSource::Fqdn, name),
            Some((other, name)) => (LabelSource::Other(other.to_owned()), name),
        };
        Self {
            source,
            name: name.to_owned(),
        }
    }

    /// A key of Kubernetes.
    pub fn k8s(name: impl Into<String>) -> Self {
        Self {
            source: LabelSource::K8s,
            name: name.into(),
        }
    }

    /// A reserved key.
    pub fn reserved(name: impl Into<String>) -> Self {
        Self {
            source: LabelSource::Reserved,
            name: name.into(),
        }
    }

    /// Whether the key says something about a pod's namespace: its name or its labels.
    pub fn names_namespace(&self) -> bool {
        matches!(self.source, LabelSource::Any | LabelSource::K8s)
            && (self.name == keys::NAMESPACE || self.name.starts_with(keys::NAMESPACE_LABELS))
    }

    /// The values that an identity has under the key: several where it names no source.
    fn values<'a>(&self, labels: &'a Labels) -> impl Iterator<Item = &'a str> {
        let sources: &[&str] = match &self.source {
            // Not the source of named ports: `matchLabels: {http: ...}` asks for a label, not for a port.
            LabelSource::Any => &["k8s", "reserved", "cidr", "fqdn"],
            other => &[other.prefix()],
        };
        sources
            .iter()
            .filter_map(|source| {
                labels
                    .0
                    .get(&format!("{source}:{}", self.name))
                    .map(String::as_str)
            })
            .collect::<Vec<_>>()
            .into_iter()
    }
}

impl fmt::Display for LabelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            LabelSource::Any => f.write_str(&self.name),
            source => write!(f, "{}:{}", source.prefix(), self.name),
        }
    }
}

/// What is asked of a label's values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Operator {
    /// It is there with one of these values.
    In(BTreeSet<String>),
    /// It is not there, or has none of these values.
    NotIn(BTreeSet<String>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

/// One requirement of a selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requirement {
    /// The label.
    pub key: LabelKey,
    /// What is asked of it.
    pub operator: Operator,
}

impl Requirement {
    /// The label has this value.
    pub fn is(key: LabelKey, value: impl Into<String>) -> Self {
        Self {
            key,
            operator: Operator::In([value.into()].into()),
        }
    }

    /// The label exists.
    pub fn exists(key: LabelKey) -> Self {
        Self {
            key,
            operator: Operator::Exists,
        }
    }

    fn holds(&self, labels: &Labels) -> bool {
        let mut values = self.key.values(labels);
        match &self.operator {
            Operator::In(wanted) => values.any(|value| wanted.contains(value)),
            Operator::NotIn(unwanted) => !values.any(|value| unwanted.contains(value)),
            Operator::Exists => values.next().is_some(),
            Operator::DoesNotExist => values.next().is_none(),
        }
    }
}

/// Requirements on an identity's labels, all of which must hold. In a canonical order, so that equal selectors
/// are equal values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Selector {
    requirements: Vec<Requirement>,
}

impl Selector {
    /// From requirements; without any it matches every known identity.
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let requirements: BTreeSet<_> = requirements.into_iter().collect();
        Self {
            requirements: requirements.into_iter().collect(),
        }
    }

    /// The requirements, sorted.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// Whether labels fulfil all requirements. A workload without labels is not known: nothing matches it.
    pub fn matches(&self, labels: &Labels) -> bool {
        !labels.0.is_empty() && self.matches_bare(labels)
    }

    /// As [`matches`](Self::matches), for what may have no labels and yet be known: nodes and namespaces.
    pub fn matches_bare(&self, labels: &Labels) -> bool {
        self.requirements
            .iter()
            .all(|requirement| requirement.holds(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.requirements.is_empty() {
            return f.write_str("{}");
        }
        for (i, requirement) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            let key = &requirement.key;
            let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join("|");
            match &requirement.operator {
                Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", list(values))?,
                Operator::In(values) => write!(f, "{key} in ({})", list(values))?,
                Operator::NotIn(values) => write!(f, "{key} not in ({})", list(values))?,
                Operator::Exists => write!(f, "{key}")?,
                Operator::DoesNotExist => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

/// What policies call groups of peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Entity {
    /// Everybody.
    All,
    /// Every address without a workload or node identity.
    World,
    /// Nodes, reserved workloads and every pod of this cluster.
    Cluster,
    /// The endpoint's own node.
    Host,
    /// Pods whose labels are not known yet.
    Init,
    /// Ingress proxies.
    Ingress,
    /// Pods that Warren does not manage.
    Unmanaged,
    /// Other nodes, those with an API server included.
    RemoteNode,
    /// Health probes.
    Health,
    /// Nobody.
    None,
    /// Nodes with an API server.
    KubeApiserver,
}

impl Entity {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::All,
        Self::World,
        Self::Cluster,
        Self::Host,
        Self::Init,
        Self::Ingress,
        Self::Unmanaged,
        Self::RemoteNode,
        Self::Health,
        Self::None,
        Self::KubeApiserver,
    ];

    /// The name in policies.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::World => "world",
            Self::Cluster => "cluster",
            Self::Host => "host",
            Self::Init => "init",
            Self::Ingress => "ingress",
            Self::Unmanaged => "unmanaged",
            Self::RemoteNode => "remote-node",
            Self::Health => "health",
            Self::None => "none",
            Self::KubeApiserver => "kube-apiserver",
        }
    }

    /// Reads a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|entity| entity.name() == name)
    }

    /// The identities meant, as selectors any of which may match; `None` for everybody.
    pub fn selectors(self, cluster: &str) -> Option<Vec<Selector>> {
        let reserved = |entity: Self| Selector::new([Requirement::exists(LabelKey::reserved(entity.name()))]);
        Some(match self {
            Self::All => return None,
            Self::None => Vec::new(),
            Self::Cluster => {
                let parts = [
                    Self::Host,
                    Self::RemoteNode,
                    Self::Init,
                    Self::Health,
                    Self::Unmanaged,
                    Self::KubeApiserver,
                ];
                let pods = Selector::new([Requirement::is(LabelKey::k8s(keys::CLUSTER), cluster)]);
                parts.into_iter().map(reserved).chain([pods]).collect()
            }
            other => vec![reserved(other)],
        })
    }
}

/// The labels of a reserved identity; empty for all others and for [`IdentityId::UNKNOWN`].
///
/// A node with an API server is a remote node as well. `host_runs_apiserver` says so of the node's own host.
pub fn reserved_labels(identity: IdentityId, host_runs_apiserver: bool) -> Labels {
    let names: &[&str] = match identity {
        IdentityId::HOST if host_runs_apiserver => &["host", "kube-apiserver"],
        IdentityId::HOST => &["host"],
        IdentityId::WORLD => &["world"],
        IdentityId::WORLD_IPV4 => &["world", "world-ipv4"],
        IdentityId::WORLD_IPV6 => &["world", "world-ipv6"],
        IdentityId::UNMANAGED => &["unmanaged"],
        IdentityId::HEALTH => &["health"],
        IdentityId::INIT => &["init"],
        IdentityId::REMOTE_NODE => &["remote-node"],
        IdentityId::KUBE_APISERVER => &["kube-apiserver", "remote-node"],
        IdentityId::INGRESS => &["ingress"],
        _ => &[],
    };
    Labels(
        names
            .iter()
            .map(|name| (format!("reserved:{name}"), String::new()))
            .collect::<BTreeMap<_, _>>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        Labels(
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        )
    }

    fn one(key: &str, operator: Operator) -> Selector {
        Selector::new([Requirement {
            key: LabelKey::parse(key),
            operator,
        }])
    }

    fn set(values: &[&str]) -> BTreeSet<String> {
        values.iter().map(|v| (*v).to_owned()).collect()
    }

    #[test]
    fn a_bare_key_matches_any_source_and_a_prefix_only_its_own() {
        let pod = labels(&[("k8s:app", "web")]);
        for (key, expected) in [
            ("app", true),
            ("any:app", true),
            ("k8s:app", true),
            ("reserved:app", false),
        ] {
            assert_eq!(
                one(key, Operator::In(set(&["web"]))).matches(&pod),
                expected,
                "{key}"
            );
        }
        assert!(one("host", Operator::Exists).matches(&reserved_labels(IdentityId::HOST, false)));
        assert!(!one("container:app", Operator::Exists).matches(&pod));
    }

    #[test]
    fn a_bare_key_never_means_a_named_port() {
        let pod = labels(&[("k8s:app", "web"), ("port:http", "TCP/8080")]);
        for key in [
            "http",
            "any:http",
            "k8s:http",
            "reserved:http",
            "cidr:http",
            "fqdn:http",
        ] {
            for (operator, expected) in [
                (Operator::Exists, false),
                (Operator::DoesNotExist, true),
                (Operator::In(set(&["TCP/8080"])), false),
                (Operator::NotIn(set(&["TCP/8080"])), true),
            ] {
                let selector = one(key, operator);
                assert_eq!(selector.matches(&pod), expected, "{selector}");
            }
        }
    }

    #[test]
    fn operators_are_those_of_kubernetes() {
        let with = labels(&[("k8s:tier", "db")]);
        let without = labels(&[("k8s:app", "web")]);
        let cases = [
            (Operator::In(set(&["db", "api"])), true, false),
            (Operator::NotIn(set(&["db"])), false, true),
            (Operator::NotIn(set(&["api"])), true, true),
            (Operator::Exists, true, false),
            (Operator::DoesNotExist, false, true),
        ];
        for (operator, on_with, on_without) in cases {
            let selector = one("tier", operator);
            assert_eq!(selector.matches(&with), on_with, "{selector}");
            assert_eq!(selector.matches(&without), on_without, "{selector}");
        }
    }

    #[test]
    fn an_unknown_identity_matches_nothing() {
        let unknown = reserved_labels(IdentityId::UNKNOWN, false);
        assert!(!Selector::new([]).matches(&unknown));
        assert!(!one("app", Operator::DoesNotExist).matches(&unknown));
        assert!(Selector::new([]).matches(&labels(&[("k8s:app", "web")])));
    }

    #[test]
    fn equal_selectors_are_equal_values() {
        let a = Requirement::is(LabelKey::parse("app"), "web");
        let b = Requirement::exists(LabelKey::k8s("tier"));
        assert_eq!(
            Selector::new([a.clone(), b.clone()]),
            Selector::new([b, a.clone(), a])
        );
    }

    #[test]
    fn the_host_of_an_api_server_is_both() {
        let matches = |entity: Entity, identity, here| {
            entity
                .selectors("c")
                .unwrap()
                .iter()
                .any(|s| s.matches(&reserved_labels(identity, here)))
        };
        assert!(matches(Entity::KubeApiserver, IdentityId::HOST, true));
        assert!(!matches(Entity::KubeApiserver, IdentityId::HOST, false));
        assert!(matches(Entity::RemoteNode, IdentityId::KUBE_APISERVER, false));
        assert!(!matches(Entity::Host, IdentityId::REMOTE_NODE, false));
    }
}
