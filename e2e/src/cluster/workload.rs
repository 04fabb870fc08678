//! Pods with the lab's application, as a manifest.

use serde_json::{Map, Value, json};

use super::pod::PORT;

/// A pod to be made: a server that answers with the pod's name.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    labels: Map<String, Value>,
    annotations: Map<String, Value>,
    ports: Vec<(String, u16)>,
    account: Option<String>,
    host_network: bool,
    probed: bool,
}

impl Workload {
    /// A pod without labels that serves [`PORT`].
    pub fn new(namespace: &str, name: &str, node: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            node: node.into(),
            labels: Map::new(),
            annotations: Map::new(),
            ports: vec![("app".into(), PORT)],
            account: None,
            host_network: false,
            probed: true,
        }
    }

    /// One more label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// One more annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// Serves these instead, TCP and UDP; the names are those of the TCP ports. The first is what kubelet probes.
    #[must_use]
    pub fn ports(mut self, ports: &[(&str, u16)]) -> Self {
        self.ports = ports
            .iter()
            .map(|(name, port)| ((*name).to_owned(), *port))
            .collect();
        self
    }

    /// Runs as this service account.
    #[must_use]
    pub fn account(mut self, account: &str) -> Self {
        self.account = Some(account.into());
        self
    }

    /// Lives in the node's network namespace.
    #[must_use]
    pub fn on_host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// kubelet does not ask it: nobody but the test sends it anything.
    #[must_use]
    pub fn unprobed(mut self) -> Self {
        self.probed = false;
        self
    }

    /// The object.
    pub fn manifest(&self) -> Value {
        let (mut arguments, mut ports) = (
            vec!["serve".into(), "--name".into(), self.name.clone()],
            Vec::new(),
        );
        for (name, port) in &self.ports {
            arguments.extend(["--listen".into(), format!("[::]:{port}")]);
            ports.push(json!({"name": name, "containerPort": port, "protocol": "TCP"}));
        }
        let mut container = json!({
            "name": "app",
            "image": "localhost/warren/lab-app:dev",
            "imagePullPolicy": "Never",
            "args": arguments,
            "ports": ports,
            // The application wants large socket buffers, and ICMP.
            "securityContext": {"capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}},
        });
        if let (true, Some((_, port))) = (self.probed, self.ports.first()) {
            container["readinessProbe"] = json!({"tcpSocket": {"port": port}, "periodSeconds": 1});
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": self.labels,
                "annotations": self.annotations,
            },
            "spec": {
                "nodeName": self.node,
                "terminationGracePeriodSeconds": 0,
                "serviceAccountName": self.account.as_deref().unwrap_or("default"),
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "hostNetwork": self.host_network,
                "containers": [container],
            },
        })
    }
}
