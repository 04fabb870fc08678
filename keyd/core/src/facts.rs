//! What policy has to know of nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use warren_model::{Labels, NodeName, policy::NodeFacts};

use crate::event::{Mode, Node};

/// The label that says so where there is no API server to ask.
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";

/// Facts of all nodes of the source.
#[derive(Debug)]
pub(crate) struct Facts {
    mode: Mode,
    closed_to_host: bool,
    apiservers: BTreeSet<IpAddr>,
    nodes: BTreeMap<NodeName, Node>,
    changed: BTreeSet<NodeName>,
}

impl Facts {
    pub(crate) fn new(mode: Mode, host_reaches_pods: bool) -> Self {
        Self {
            mode,
            closed_to_host: !host_reaches_pods,
            apiservers: BTreeSet::new(),
            nodes: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    pub(crate) fn upsert(&mut self, node: &Node) {
        self.changed.insert(node.name.clone());
        self.nodes.insert(node.name.clone(), node.clone());
    }

    pub(crate) fn delete(&mut self, name: &NodeName) {
        self.nodes.remove(name);
        self.changed.insert(name.clone());
    }

    pub(crate) fn set_apiservers(&mut self, addresses: BTreeSet<IpAddr>) {
        if self.mode == Mode::StandAlone {
            return;
        }
        let before = std::mem::replace(&mut self.apiservers, addresses);
        for (name, node) in &self.nodes {
            let runs = |set: &BTreeSet<IpAddr>| node.addresses.iter().any(|ip| set.contains(ip));
            if runs(&before) != runs(&self.apiservers) {
                self.changed.insert(name.clone());
            }
        }
    }

    pub(crate) fn of(&self, name: &NodeName) -> Option<NodeFacts> {
        let node = self.nodes.get(name)?;
        let labels = node
            .labels
            .iter()
            .map(|(key, value)| (format!("k8s:{key}"), value.clone()));
        let runs_apiserver = match self.mode {
            Mode::Kubernetes => node.addresses.iter().any(|ip| self.apiservers.contains(ip)),
            Mode::StandAlone => node.labels.contains_key(CONTROL_PLANE),
        };
        Some(NodeFacts {
            labels: Labels(labels.collect()),
            runs_apiserver,
            closed_to_host: self.closed_to_host,
            audit: node.policy_audit,
        })
    }

    pub(crate) fn take_changed(&mut self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::tests::node;

    #[test]
    fn who_runs_an_api_server_is_the_apis_word_or_the_manifests_label() {
        let mut labelled = node(1);
        labelled.labels.insert(CONTROL_PLANE.into(), String::new());
        let mut kubernetes = Facts::new(Mode::Kubernetes, true);
        let mut alone = Facts::new(Mode::StandAlone, false);
        for facts in [&mut kubernetes, &mut alone] {
            facts.upsert(&labelled);
            facts.upsert(&node(2));
            facts.take_changed();
            facts.set_apiservers([IpAddr::from([172, 30, 0, 2])].into());
        }
        assert_eq!(kubernetes.take_changed(), ["node2".into()].into());
        assert_eq!(alone.take_changed(), BTreeSet::new());
        let runs =
            |facts: &Facts| ["node1", "node2"].map(|name| facts.of(&name.into()).unwrap().runs_apiserver);
        assert_eq!(runs(&kubernetes), [false, true]);
        assert_eq!(runs(&alone), [true, false]);
        assert!(!kubernetes.of(&"node1".into()).unwrap().closed_to_host);
        let facts = alone.of(&"node1".into()).unwrap();
        assert!(facts.closed_to_host && facts.labels.0.contains_key(&format!("k8s:{CONTROL_PLANE}")));
        alone.delete(&"node1".into());
        assert_eq!(alone.of(&"node1".into()), None);
    }
}
